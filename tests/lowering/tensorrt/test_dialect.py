"""The forms that TensorRT fuses compute what the graph does: in float32 to rounding, in float16 without overflow."""

import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import qcompiler as qc
from qcompiler.artifacts.native import load_native, save_native
from qcompiler.lowering.onnx import OnnxArtifact
from qcompiler.lowering.onnx.writer import emit, store
from qcompiler.lowering.tensorrt.dialect import tensorrt_dialect
from qcompiler.lowering.tensorrt.reference import dynamic_quantize
from qcompiler.numerics import fp4
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache
from tests.lowering.onnx.harness import GraphMaker
from tests.tiny_checkpoint import save_checkpoint

STATIC, DYNAMIC = InsertQDQ(observer="minmax"), InsertQDQ(observer=None)
IDS = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("float")
    save_native(qc.capture(save_checkpoint(root / "model", layers=1)), root / "native", {}, {})
    return root / "native"


def written(graph: Any, place: Path, float_dtype: str = "float32") -> Path:
    store(emit(graph, tensorrt_dialect(graph, float_dtype)), place, {})
    return place


@pytest.mark.parametrize(
    ("scheme", "passes"),
    [
        ("w4a16-g16-asym", [RTN()]),
        ("w4a16-channel", [RTN()]),
        ("w4a16-channel-asym", [RTN()]),
        ("w3a16-g32-asym", [RTN()]),
        ("w2a16-g16-asym", [RTN()]),
        ("w8a16-channel-asym", [RTN()]),
        ("w8a16-g16-asym", [RTN()]),
        ("w8a8-tensor", [RTN(), STATIC]),
        ("w8a8-actsym", [RTN(), STATIC]),
        ("w8a8-dynamic-actasym", [RTN(), DYNAMIC]),
        ("w8a8-dyntensor", [RTN(), DYNAMIC]),
        ("w8a8-dyngroup-g32", [RTN(), DYNAMIC]),
        ("w8a8-channel-asym", [RTN(), STATIC]),
        ("w4a8-dynamic-actasym-g16", [RTN(), DYNAMIC]),
        ("w4a8-g16", [RTN(), STATIC]),
        ("fp8-block-dyngroup", [RTN(), DYNAMIC]),
    ],
)
def test_same_numbers_in_float32(scheme, passes, captured, tmp_path):
    """Rounded inputs may fall to either side of a border now and then, which moves a logit more than rounding does."""
    graph, _, _ = load_native(captured)
    tokens = torch.randint(4096, (4, 32), generator=torch.Generator().manual_seed(1))
    result = qc.compile(graph, [Assign(scheme), *passes], qc.Calibration.from_tokens(tokens), device="cpu")
    wanted = result.artifact().forward(IDS)
    found = OnnxArtifact(written(result.graph, tmp_path / "out")).forward(IDS)
    difference = (found - wanted).abs() / wanted.abs().max()
    assert difference.median() < 1e-5
    assert difference.max() < (1e-4 if passes == [RTN()] else 3e-2)


@pytest.mark.parametrize("cache", [QuantizeKVCache("int8", group_size=16, symmetric=False), QuantizeKVCache("int4")])
def test_caches_of_unsigned_codes(cache, captured, tmp_path):
    graph, _, _ = load_native(captured)
    result = qc.compile(graph, [cache], qc.Calibration.from_tokens(IDS), device="cpu")
    native, found = result.artifact(), OnnxArtifact(written(result.graph, tmp_path / "out"))
    logits, kept = found.prefill(IDS[:, :16])
    step, kept = found.step(IDS[:, 16:20], kept)
    wanted = native.forward(IDS[:, :20])
    assert (torch.cat((logits, step), 1) - wanted).abs().max() < 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["static", "per token", "int4"])
def test_activations_of_ten_thousand_fit_float16(kind, tmp_path):
    """Results of 1e4: what they are ahead of the scales of weights would be 1e6, which float16 does not hold."""
    make = GraphMaker()
    canonical, tokens, width, rows = torch.ops.qcompiler, 5, 64, 16
    x = torch.randn(7, tokens, width)
    x[..., 3] = 1e4
    node = make.input(x, "x")
    if kind == "int4":
        codes = torch.randint(-8, 8, (rows, width), dtype=torch.int8)
        parts = (
            make.weight("w.weight_codes", codes, "int4"),
            make.weight("w.weight_scale", torch.full((rows, 4), 0.1)),
        )
        weight, rounded = make.call(canonical.dequantize.default, *parts, None, 1, 16, torch.float32), node
    else:
        codes = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
        parts = (make.weight("w.weight_codes", codes, "int8"), make.weight("w.weight_scale", torch.full((rows,), 0.01)))
        weight = make.call(canonical.dequantize.default, *parts, None, 0, 0, torch.float32)
        if kind == "static":
            scale = make.weight("w.input_scale", torch.tensor(1e4 / 127))
            codes_of_x = make.call(canonical.quantize.default, node, scale, None, 0, 0, torch.int8)
            rounded = make.call(canonical.dequantize.default, codes_of_x, scale, None, 0, 0, torch.float32)
        else:
            chosen = make.call(canonical.choose_qparams.default, node, torch.int8, -1)
            scale = make.call(operator.getitem, chosen, 0)
            codes_of_x = make.call(canonical.quantize.default, node, scale, None, -1, width, torch.int8)
            rounded = make.call(canonical.dequantize.default, codes_of_x, scale, None, -1, width, torch.float32)
    result = make.call(canonical.linear.default, rounded, weight, None)
    graph = make.graph(result)
    model = onnx.load(written(graph, tmp_path / "out", "float16") / "model.onnx")
    with np.errstate(over="raise"):
        (found,) = ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    wanted = make.values[result]
    assert np.isfinite(found).all()
    assert np.abs(found - wanted.numpy()).max() < 1e-3 * wanted.abs().max()


def test_float4_as_tensorrt_rounds_it():
    x = torch.randn(3, 64) * torch.logspace(-3, 3, 64)
    factor = torch.tensor(x.abs().max().item() / (6 * 448))
    codes, scales = dynamic_quantize(x.numpy(), factor.numpy(), 16)
    wanted = torch.ops.qcompiler.fp4_scale(x, factor, 16, False)
    assert (torch.from_numpy(scales.astype(np.float32)) == wanted.float()).all()
    numbers = fp4.decode(torch.ops.qcompiler.fp4_quantize(x, wanted, factor, 16))
    assert (torch.from_numpy(codes.astype(np.float32)) == numbers).all()
