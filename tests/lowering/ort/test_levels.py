"""The accuracy level: asked for, or chosen by what it costs on held-out text."""

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch

import qcompiler as qc
from qcompiler.lowering.ort import levels
from qcompiler.lowering.ort.reader import OrtArtifact


def levels_of(path: Path) -> set[int]:
    model = onnx.load(path / "model.onnx", load_external_data=False)
    return {
        a.i for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"
    }


@pytest.mark.parametrize(("bound", "level"), [(10.0, 4), (1e-9, 0)])
def test_chosen_by_the_divergence_on_text(bound, level, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "BOUND", bound)
    text = torch.randint(4096, (4, 32))
    result = dataclasses.replace(tiny("w4a16-rtn"), held_out=text)
    report = qc.lower(result, "ort", tmp_path / "out")
    assert report["accuracy_level"] == level
    assert 1e-9 < report["level_kl_divergence"] < 10.0
    assert levels_of(tmp_path / "out") == {level}
    assert any(f"accuracy level {level}: level 4 diverges by" in note for note in report["notes"])
    assert json.loads((tmp_path / "out" / "ort.json").read_text())["accuracy_level"] == level
    ids = text[:1, :16]
    exact, written = (OrtArtifact(tmp_path / "out", accuracy_level=n).forward(ids) for n in (0, None))
    assert bool((exact - written).abs().max() > 1e-4) is (level == 4)


def test_exact_without_text_and_as_asked(tiny, tmp_path):
    result = dataclasses.replace(tiny("w4a16-rtn"), held_out=None)
    report = qc.lower(result, "ort", tmp_path / "auto", verify=False)
    assert report["accuracy_level"] == 0
    assert any("no held-out text" in note for note in report["notes"])
    report = qc.lower(result, "ort", tmp_path / "four", accuracy_level=4, verify=False)
    assert report["accuracy_level"] == 4
    assert levels_of(tmp_path / "four") == {4}
