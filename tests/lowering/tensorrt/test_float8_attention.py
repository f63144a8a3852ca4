"""Attention in FP8: one kernel that reads codes in every profile, its numbers, and where it is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import qcompiler as qc
from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.writer import emit, store
from qcompiler.lowering.tensorrt import TensorRTTarget
from qcompiler.lowering.tensorrt.dialect import tensorrt_dialect
from qcompiler.lowering.tensorrt.reference import OPERATORS
from qcompiler.passes import RTN, recipe
from tests.lowering.onnx.harness import GraphMaker
from tests.models import canonical_graph, copy_graph
from tests.tiny_checkpoint import save_checkpoint

IDS = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "model", layers=1)


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> Any:
    passes = [RTN(bits=4, group_size=16), *recipe("kv-fp8-static")]
    return qc.compile(checkpoint, passes, qc.Calibration.from_tokens(IDS), device="cpu")


@pytest.mark.parametrize("sm", ["89", "120"])
def test_every_profile_has_a_kernel_of_codes(sm, result, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    report = qc.lower(result, "tensorrt", tmp_path / "out", sm=sm, attention="fp8", strict=True)
    engine = report["engines"][sm]
    assert (engine["fused_linears"], engine["fused_attentions"]) == ("7 of 7", "1 of 1")
    assert engine["attention_kernels"] == ["gemm_mha_v2", "gemv_mha_v1"]
    document = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert [profile["shapes"]["input_ids"] for profile in document["profiles"]] == [
        [[1, 32], [1, 64], [1, 64]],
        [[1, 1], [1, 1], [1, 1]],
    ]
    (places,) = document["engines"][sm]["attentions"].values()
    for place in places:
        (layer,) = (layer for layer in document["engines"][sm]["layers"] if layer["name"] == place["layer"])
        assert [tensor["dtype"] for tensor in layer["inputs"]].count("FP8") == 3
    assert report["parity"]["kl_divergence"] < 0.05  # of a random model, whose attention decides little


def test_without_it_the_kernel_reads_floats(result, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from qcompiler.lowering.tensorrt import writer

    honest = writer.fused_attentions
    monkeypatch.setattr(writer, "fused_attentions", lambda layers, nodes, **_: honest(layers, nodes, in_float8=True))
    report = qc.lower(result, "tensorrt", tmp_path / "out", verify=False)
    assert {found["reason"] for found in report["findings"]} == {"a kernel that reads Half"}


@pytest.mark.parametrize(("float_dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_queries_and_softmax_are_rounded_and_nothing_else(float_dtype, tolerance, tmp_path):
    make, canonical = GraphMaker(), torch.ops.qcompiler
    q = torch.randn(7, 4, 5, 16) * 3
    codes = {part: torch.randn(7, 2, 18, 16).to(torch.float8_e4m3fn) for part in "kv"}
    scales = {"k": 0.05, "v": 0.25}
    parts = [
        make.call(
            canonical.dequantize.default,
            make.input(codes[part], part),
            make.weight(f"{part}.scale", torch.tensor(scales[part])),
            None,
            0,
            0,
            torch.float32,
        )
        for part in "kv"
    ]
    node = make.call(canonical.attention.default, make.input(q, "q"), *parts, None, 0.25, True)
    graph = make.graph(node)
    store(emit(graph, tensorrt_dialect(graph, float_dtype, "fp8")), tmp_path / "out", {})
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [made.op_type for made in model.graph.node].count("TRT_QuantizedAttention") == 1
    feeds = {part: onnx.numpy_helper.to_array(_float8(codes[part])) for part in "kv"} | {"q": q.numpy()}
    (found,) = ReferenceEvaluator(model, new_ops=list(OPERATORS)).run(None, feeds)

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float8_e4m3fn).float()

    keys, values = ((codes[part].float() * scales[part]).repeat_interleave(2, 1) for part in "kv")
    logits = rounded((q * 0.25).half() if float_dtype == "float16" else q * 0.25) @ keys.mT
    logits = logits.masked_fill(torch.ones(5, 18).tril(13) == 0, -math.inf)
    wanted = rounded(logits.softmax(-1) * 448) / 448 @ values
    assert np.abs(found - wanted.numpy()).max() < tolerance * wanted.abs().max()
    assert (wanted - make.values[node]).abs().max() > 1e-2 * wanted.abs().max()  # rounding is seen


def _float8(codes: torch.Tensor) -> onnx.TensorProto:
    raw = codes.view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor("x", onnx.TensorProto.FLOAT8E4M3FN, list(codes.shape), raw, raw=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sm": "86+89"}, "this GPU has no attention in FP8"),
        ({"float_dtype": "float32"}, "attention in FP8 gives 16 bits"),
    ],
)
def test_options_that_exclude_it(options, words):
    with pytest.raises(TargetError, match=words):
        TensorRTTarget(attention="fp8", **options)


@pytest.mark.parametrize("caches", ["", "kv-int8", "kv-fp8", "kv-fp8-static-head"])
def test_other_caches_are_refused_ahead_of_calibration(caches, checkpoint):
    passes = [RTN(bits=4, group_size=16), *(recipe(caches) if caches else ())]
    target = TensorRTTarget(attention="fp8", length=40)
    with pytest.raises(TargetError, match="attention in FP8 cannot read this cache") as caught:
        qc.compile(checkpoint, passes, targets=[target], device="cpu")
    assert "kv-fp8-static" in str(caught.value.remedy)


def test_a_model_without_such_a_kernel():
    graph = copy_graph(canonical_graph("gemma2"))  # caps its logits
    with pytest.raises(TargetError, match="no attention of this model has a kernel in FP8"):
        TensorRTTarget(attention="fp8", length=40).check_graph(graph)


def test_a_sequence_shorter_than_what_is_read_at_once(result, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match="shorter than what is read at once"):
        qc.lower(result, "tensorrt", tmp_path / "out", attention="fp8", length=31)


def test_the_builders_refusal_says_which_profiles_it_takes(result, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    profiles = "prefill:sequence=1..32:past_sequence=0"
    with pytest.raises(TargetError, match="TensorRT's builder failed") as caught:
        qc.lower(result, "tensorrt", tmp_path / "out", attention="fp8", profiles=profiles)
    assert "sequence=32" in str(caught.value.remedy)
