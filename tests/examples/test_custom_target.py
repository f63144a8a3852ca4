"""A target that lies outside of the package: written, run by transformers, compared."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompiler as qc
from examples import custom_target
from examples.custom_target import FloatCheckpoint
from qcompiler.errors import TargetError, VerificationError
from qcompiler.passes import AWQ, RTN, Assign, InsertQDQ
from tests.tiny_checkpoint import command, save_checkpoint

FILE = Path(custom_target.__file__)


def test_it_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_what_the_native_artifact_does(dtype: str, tmp_path: Path) -> None:
    result = qc.compile(save_checkpoint(tmp_path / "model", layers=1), [AWQ(), RTN(bits=4, group_size=16)])
    report = qc.lower(result, f"{FILE}:FloatCheckpoint:dtype={dtype}", tmp_path / "out")
    assert report["parity"]["max_difference"] < (1e-5 if dtype == "float32" else 5e-2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    (site, *_) = result.graph.sites()
    assert torch.equal(tensors[site.weight], result.graph.read_weight(site).to(getattr(torch, dtype)))
    assert not any("codes" in name for name in tensors)


def test_a_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, torch.Tensor], *arguments: object, **options: object) -> None:
        name = next(name for name in tensors if name.endswith("down_proj.weight"))
        save_file({**tensors, name: 1.5 * tensors[name]}, *arguments, **options)

    result = qc.compile(save_checkpoint(tmp_path / "model", layers=1), [RTN(bits=4, group_size=16)])
    monkeypatch.setattr(custom_target, "save_file", save)
    with pytest.raises(VerificationError):
        qc.lower(result, FloatCheckpoint(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", layers=1)
    target = f"{FILE}:FloatCheckpoint:dtype=float32"
    outcome = command("compile", model, "-r", "w4a16-rtn", "--to", target, "-o", tmp_path / "out", "--json")
    written = Path(outcome.result["artifacts"]["float_checkpoint"])
    assert json.loads((written / "config.json").read_text())["model_type"] == "llama"
    assert command("evaluate", written, "--against", model, "--text", __file__, "--json").status == 0


def test_rounded_inputs_are_refused_ahead_of_all_work(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", layers=1)
    with pytest.raises(TargetError, match="does not take this scheme") as caught:
        qc.compile(model, [Assign("w8a8-dynamic"), InsertQDQ(None), RTN()], targets=[FloatCheckpoint()])
    assert "weights alone" in str(caught.value.remedy)
