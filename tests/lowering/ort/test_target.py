"""What the target says ahead of calibration, its options, and what it refuses."""

import sys
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import InputError, MissingDependencyError, TargetError
from qcompiler.ir import CacheFormat
from qcompiler.lowering.ort import OrtTarget, installed
from qcompiler.lowering.ort.reader import OrtArtifact
from qcompiler.numerics import QuantSpec, Scheme


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        ("w4a16", 256, "fused"),
        ("w3a16", 256, "fused"),
        ("w8a16", 256, "fused"),
        ("w4a16-g48", 144, "fused"),
        ("w4a16-g8", 256, "runs"),
        ("w4a16-lut", 256, "runs"),
        ("w8a8", 256, "fused"),
        ("w8a8-dynamic", 256, "runs"),
        ("fp8", 256, "runs"),
        ("nvfp4", 256, "refused"),
    ],
)
def test_schemes(scheme: str, width: int, status: str) -> None:
    assert OrtTarget().supports(Scheme.parse(scheme), width).status == status


def test_caches_and_tables() -> None:
    target = OrtTarget()
    own = [CacheFormat("int8", "static"), CacheFormat("int4", "static")]
    assert [target.supports_cache(spec).status for spec in own] == ["fused", "fused"]
    other = [
        CacheFormat("int8"),
        CacheFormat("int8", "static", symmetric=False),
        CacheFormat("float8_e4m3fn", "static"),
    ]
    for spec in other:
        support = target.supports_cache(spec)
        assert support.status == "runs"
        assert "kv-int8-static" in support.reason
    assert "CPU" in OrtTarget(float_dtype="float16").supports_cache(CacheFormat("int4", "static")).reason
    assert target.supports_table(QuantSpec("int4", "per_group", 32), 256).status == "fused"
    assert target.supports_table(QuantSpec("int8", "per_channel", None), 256).status == "fused"
    assert target.supports_table(QuantSpec("int4", "per_group", 24), 240).status == "refused"
    assert target.supports_table(QuantSpec("float8_e4m3fn", "per_channel", None), 256).status == "refused"


@pytest.mark.parametrize(
    "options", [{"accuracy_level": 5}, {"accuracy_level": "best"}, {"length": 0}, {"float_dtype": "bfloat16"}]
)
def test_options_that_do_not_hold(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError):
        OrtTarget(**options)


def test_more_positions_than_the_model_has(tiny, tmp_path):
    with pytest.raises(TargetError, match="positions"):
        qc.lower(tiny("w4a16-rtn"), "ort", tmp_path / "out", length=65)
    assert not (tmp_path / "out").exists()


def test_an_onnxruntime_that_is_too_old(tiny, tmp_path, monkeypatch):
    known = installed._schemas()
    for key in (("com.microsoft", "GroupQueryAttention"), ("com.microsoft", "SkipSimplifiedLayerNormalization")):
        monkeypatch.setattr(installed, "_schemas", lambda key=key: {k: v for k, v in known.items() if k != key})
        with pytest.raises(TargetError, match="too old") as raised:
            qc.lower(tiny("w4a16-rtn"), "ort", tmp_path / "out")
        assert key[1] in str(raised.value.got)


def test_without_onnxruntime(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingDependencyError, match="ONNX Runtime"):
        OrtTarget().check_graph(tiny("w4a16-rtn").graph)


def test_a_folder_is_known_by_its_file_of_choices(tiny, tmp_path, monkeypatch):
    qc.lower(tiny("w4a16-rtn"), "ort", tmp_path / "out", verify=False)
    assert OrtTarget.wrote(tmp_path / "out")
    assert isinstance(qc.api.open_artifact(tmp_path / "out"), OrtArtifact)
    monkeypatch.setattr("qcompiler.lowering.ort.target.choose_device", lambda _: torch.device("cuda"))
    with pytest.raises(InputError, match="CPU"):
        OrtTarget.open(tmp_path / "out", exact=True, device="cuda")
    (tmp_path / "out" / "ort.json").unlink()
    assert not OrtTarget.wrote(tmp_path / "out")
