"""Every recipe on a tiny model: engines by NVIDIA's builder, and their ONNX beside the native artifact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.native import load_native, save_native
from qcompiler.errors import TargetError
from qcompiler.passes import RECIPES, recipe
from tests.tiny_checkpoint import save_checkpoint

pytest.importorskip("tensorrt_rtx")

TABLES = ("w3a16-squeezellm", "w4a16-squeezellm")
FLOAT4 = ("nvfp4", "mxfp4")
DEQUANTIZED = ("fp8-block", "mxfp4")
WITH_CACHES = ("w4a16-rtn+kv-int8", "w4a16-rtn+kv-int4", "w8a16+kv-fp8", "fp8+kv-fp8-static")
LAYERS = 7


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("float")
    save_native(qc.capture(save_checkpoint(root / "model", layers=1)), root / "native", {}, {})
    return root / "native"


def compiled(captured: Path, name: str) -> Any:
    graph, _, _ = load_native(captured)
    ids = torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))
    return qc.compile(graph, recipe(name), qc.Calibration.from_tokens(ids), device="cpu")


@pytest.mark.parametrize("name", [*(name for name in RECIPES if name not in TABLES), *WITH_CACHES])
def test_engine_is_built_and_computes_the_same(name, captured, tmp_path):
    sm = "120" if name in FLOAT4 else "89"
    report = qc.lower(compiled(captured, name), "tensorrt", tmp_path / "out", sm=sm)
    (engine,) = report["engines"].values()
    assert engine["fused_attentions"] == "1 of 1"
    if name not in DEQUANTIZED:
        assert engine["fused_linears"] == f"{LAYERS} of {LAYERS}"
        assert report["findings"] == []
    assert {"model.onnx", f"engine-sm{sm}.plan", "layers.json", "run.py"} <= set(report["files"])


@pytest.mark.parametrize(("name", "kind", "groups"), [("emb-int8", "Int8", 1), ("emb-int4", "Int4", 2)])
def test_embedding_tables_are_codes_in_the_engine(name, kind, groups, captured, tmp_path):
    report = qc.lower(compiled(captured, name), "tensorrt", tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "layers.json").read_text())["engines"]["89"]["layers"]
    reading = [layer for layer in layers if any("embed_tokens" in origin for origin in layer["origins"])]
    assert len(reading) == 2  # for each profile one
    for layer in reading:
        types = {constant["dtype"]: constant["shape"] for constant in layer["constants"]}
        assert types == {kind: [4096, 64], "Half": [4096, groups]}
    assert report["parity"]["max_difference"] < 2e-2
    assert not any("embedding table" in note for note in report["notes"])


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_refused_ahead_of_calibration(name, captured):
    graph, _, _ = load_native(captured)
    with pytest.raises(TargetError, match="codebooks"):
        qc.compile(graph, recipe(name), None, targets=["tensorrt"])
