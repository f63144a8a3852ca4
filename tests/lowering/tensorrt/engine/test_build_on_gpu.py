"""The way through `tensorrt`, which builds for the GPU at hand, with an imitation of it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from qcompiler.errors import TargetError
from qcompiler.lowering.tensorrt.engine import api, build_engine
from tests.lowering.tensorrt.engine import imitation_builder


@pytest.fixture
def model(tmp_path, monkeypatch):
    """An ONNX file, beside the imitation and a GPU of SM 90."""
    packages = tmp_path / "packages"
    packages.mkdir()
    shutil.copy(Path(__file__).with_name("imitation_builder.py"), packages / "tensorrt.py")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setitem(sys.modules, "tensorrt", imitation_builder)
    monkeypatch.setattr(api, "_capability_at_hand", lambda: 90)
    (tmp_path / "model.onnx").touch()
    return tmp_path / "model.onnx"


def test_layers_are_asked_of_the_inspector(model, tmp_path):
    built = build_engine(model, tmp_path / "a.plan", capability=90, workspace=5)
    assert (built.package, built.version, built.capability) == ("tensorrt", "10.16", 90)
    assert json.loads((tmp_path / "a.plan").read_text()) == {"workspace": 5, "cached": ""}
    assert [(layer.name, layer.inputs[0].dtype) for layer in built.layers] == [("fc", "Half")]


def test_a_timing_cache_is_kept_and_begun_anew(model, tmp_path):
    cache = tmp_path / "timings"
    for known in ("", "+timed"):
        built = build_engine(model, tmp_path / "a.plan", capability=90, timing_cache=cache)
        assert json.loads((tmp_path / "a.plan").read_text())["cached"] == known
        assert built.warnings == ()
    assert cache.read_text() == "+timed+timed"
    cache.write_text("of another GPU")
    built = build_engine(model, tmp_path / "a.plan", capability=90, timing_cache=cache)
    assert "begun anew" in built.warnings[0]
    assert cache.read_text() == "+timed"


def test_what_it_cannot_do_is_said(model, tmp_path, monkeypatch):
    with pytest.raises(TargetError, match="does not stream"):
        build_engine(model, tmp_path / "a.plan", capability=90, weight_streaming=True)
    monkeypatch.setenv("NO_DRIVER", "1")
    with pytest.raises(TargetError, match="does not start") as caught:
        build_engine(model, tmp_path / "a.plan", capability=90)
    assert "pip install tensorrt-rtx" in str(caught.value)
    assert not (tmp_path / "a.plan").exists()
