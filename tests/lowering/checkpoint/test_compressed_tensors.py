"""The layout of compressed-tensors: every format unpacked number by number, and read by transformers."""

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.compressed_tensors import supports
from qcompiler.numerics import QuantSpec, Scheme
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, native_weight

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
NEAR = 0.05  # of logits, where inputs are rounded: one that lies at a tie may fall to the other side


def group(config: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"][f"group_{number}"]
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", ["-g32", "-channel", "-g32-asym", "-channel-asym", "-tensor", "-tensor-asym"])
def test_integers_in_words(bits: int, options: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, f"w{bits}a16{options}")
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    groups = 5 if "g32" in options else 1
    own = {name.removeprefix(f"{DOWN}."): t for name, t in tensors.items() if name.startswith(DOWN)}
    expected = {"weight_packed": [64, 160 * bits // 32], "weight_scale": [64, groups], "weight_shape": [2]}
    if "asym" in options:
        expected["weight_zero_point"] = [64 * bits // 32, groups]
    assert {name: list(t.shape) for name, t in own.items()} == expected
    assert {name: t.dtype for name, t in own.items() if name != "weight_scale"} == {
        name: torch.int64 if name == "weight_shape" else torch.int32 for name in expected if name != "weight_scale"
    }
    assert own["weight_scale"].dtype == torch.bfloat16
    for name in (QUERY, DOWN):
        np.testing.assert_array_equal(unpacking.packed_integers(tensors, name, bits), native_weight(result.graph, name))
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    weights = group(config)["weights"]
    assert (weights["num_bits"], weights["type"], weights["symmetric"]) == (bits, "int", "asym" not in options)
    expected_group = ("group", 32) if groups > 1 else ("channel", None)
    assert (weights["strategy"], weights["group_size"]) == expected_group
    assert group(config)["input_activations"] is None
    assert report["parity"]["max_difference"] == 0


@pytest.mark.parametrize("scheme", ["w3a16-channel-asym", "w4a16-channel-asym", "w2a16-channel", "w3a16-channel"])
def test_widths_that_fill_no_words(scheme: str, odd_graph: Graph, write: Write) -> None:
    directory, report, result = write(odd_graph, scheme, overrides={"lm_head": scheme})
    tensors, bits = unpacking.read_tensors(directory), int(scheme[1])
    for name in (QUERY, DOWN, "lm_head"):
        np.testing.assert_array_equal(unpacking.packed_integers(tensors, name, bits), native_weight(result.graph, name))
    config = unpacking.read_config(directory)
    assert config["quantization_config"]["ignore"] == []
    assert group(config)["targets"] == ["Linear", "lm_head"]
    assert not any("the embedding" in note for note in report["notes"])
    assert f"{QUERY}.bias" in tensors
    assert report["parity"]["max_difference"] == 0


def test_groups_as_wide_as_some_layers(odd_graph: Graph, write: Write) -> None:
    """Hidden 72 has one scale under groups of 100, and so has the intermediate 100."""
    directory, report, _ = write(odd_graph, "w4a16-g100")
    assert group(unpacking.read_config(directory))["weights"]["strategy"] == "channel"
    assert report["parity"]["max_difference"] == 0


INPUTS = {
    "w8a8": ("int", "tensor", False, False),
    "w8a8-actsym": ("int", "tensor", True, False),
    "w8a8-tensor": ("int", "tensor", False, False),
    "w8a8-asym": ("int", "tensor", False, False),
    "w8a8-dynamic": ("int", "token", True, True),
    "w8a8-dyntensor": ("int", "tensor", False, True),
    "fp8": ("float", "tensor", True, False),
    "fp8-tensor": ("float", "tensor", True, False),
    "fp8-dynamic": ("float", "token", True, True),
    "fp8-block": ("float", "tensor", True, False),
    "fp8-g32": ("float", "tensor", True, False),
}


@pytest.mark.parametrize("scheme", INPUTS)
def test_eight_bits_with_inputs(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme)
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    codes, scale = tensors[f"{DOWN}.weight"], unpacking.numbers(tensors[f"{DOWN}.weight_scale"])
    is_float = scheme.startswith("fp8")
    assert codes.dtype == (torch.float8_e4m3fn if is_float else torch.int8)
    shape = {"w8a8-tensor": (1,), "fp8-tensor": (1,), "fp8-block": (1, 2), "fp8-g32": (64, 5)}.get(scheme, (64, 1))
    assert scale.shape == shape
    values = unpacking.e4m3_matrix(codes) if is_float else codes.numpy().astype(np.int64)
    if scheme == "w8a8-asym":
        values = values - tensors[f"{DOWN}.weight_zero_point"].numpy().astype(np.int64)
    if scheme == "fp8-block":
        values, scale = np.asarray(values), np.repeat(scale, (128, 32), axis=1)
    found = unpacking.scaled(values, scale.reshape(scale.shape if scale.ndim == 2 else (1, 1)))
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    kind, strategy, symmetric, dynamic = INPUTS[scheme]
    args = group(config)["input_activations"]
    assert (args["type"], args["strategy"], args["symmetric"], args["dynamic"]) == (kind, strategy, symmetric, dynamic)
    assert (f"{DOWN}.input_scale" in tensors) is not dynamic
    assert (f"{DOWN}.input_zero_point" in tensors) is not (symmetric or dynamic)
    if not dynamic:
        stored = result.graph.weights.read(f"{DOWN}.input_scale")
        assert torch.equal(tensors[f"{DOWN}.input_scale"], stored.reshape(1))
    if not dynamic and not symmetric:
        zero = int(result.graph.weights.read(f"{DOWN}.input_zero_point"))
        assert tensors[f"{DOWN}.input_zero_point"].tolist() == [zero - 128]
    assert report["parity"]["max_difference"] < NEAR


@pytest.mark.parametrize(("scheme", "kind"), [("fp8-block-dyngroup", "float"), ("w8a8-dyngroup", "int")])
def test_inputs_in_groups(
    scheme: str, kind: str, wide_graph: Graph, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of 128 by 128 and inputs in groups of 128 is what engines multiply 8-bit floats in."""
    directory, report, _ = write(wide_graph, scheme)
    assert capsys.readouterr().err == ""  # no bar of a library either
    args = group(unpacking.read_config(directory))["input_activations"]
    expected = {"num_bits": 8, "type": kind, "strategy": "group", "group_size": 128, "dynamic": True}
    assert {key: args[key] for key in expected} == expected
    assert f"{DOWN}.input_scale" not in unpacking.read_tensors(directory)
    assert report["parity"]["max_difference"] < NEAR


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8-g32-asym", "w4a4-g32"])
def test_four_bits_with_inputs(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme)
    tensors = unpacking.read_tensors(directory)
    np.testing.assert_array_equal(unpacking.packed_integers(tensors, DOWN, 4), native_weight(result.graph, DOWN))
    assert group(unpacking.read_config(directory))["input_activations"]["num_bits"] == int(scheme[3])
    assert report["parity"]["max_difference"] < NEAR


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4a16"])
def test_floats_of_four_bits(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme)
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    assert tensors[f"{DOWN}.weight_packed"].shape == (64, 80)
    assert (tensors[f"{DOWN}.weight_scale"].dtype, tensors[f"{DOWN}.weight_scale"].shape) == (
        torch.float8_e4m3fn,
        (64, 10),
    )
    whole = tensors[f"{DOWN}.weight_global_scale"].numpy()
    scales = unpacking.e4m3_matrix(tensors[f"{DOWN}.weight_scale"]) / whole
    found = unpacking.scaled(unpacking.fp4_matrix(tensors[f"{DOWN}.weight_packed"]), scales)
    np.testing.assert_allclose(found, native_weight(result.graph, DOWN), rtol=2**-22)  # 1 / (1 / factor)
    weights, inputs = group(config)["weights"], group(config)["input_activations"]
    assert (weights["strategy"], weights["group_size"], weights["dynamic"]) == ("tensor_group", 16, False)
    assert weights["scale_dtype"] == "torch.float8_e4m3fn"
    if scheme == "nvfp4":
        assert (inputs["strategy"], inputs["dynamic"]) == ("tensor_group", "local")
        factor = result.graph.weights.read(f"{DOWN}.input_scale")
        torch.testing.assert_close(tensors[f"{DOWN}.input_global_scale"], 1 / factor.reshape(1), rtol=0, atol=0)
    assert report["parity"]["max_difference"] <= report["parity"]["tolerance"]
    assert any("transformers rounds" in note for note in report["notes"])
    assert not any("vLLM takes one for all" in note for note in report["notes"])


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp4a16", "mxfp4a16-ceil"])
def test_mxfp4(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme)
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    stored = tensors[f"{DOWN}.weight_scale"]
    assert (stored.dtype, stored.shape) == (torch.uint8, (64, 5))
    scales = [[2.0 ** (byte - 127) for byte in row] for row in stored.tolist()]
    found = unpacking.scaled(unpacking.fp4_matrix(tensors[f"{DOWN}.weight_packed"]), scales)
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    weights = group(config)["weights"]
    assert (weights["strategy"], weights["group_size"], weights["scale_dtype"]) == ("group", 32, "torch.uint8")
    if scheme == "mxfp4":
        assert report["notes"] == ["not compared: readers of MXFP4 choose the scales of inputs by rules of their own"]
        assert "parity" not in report
    else:
        assert report["parity"]["max_difference"] <= report["parity"]["tolerance"]


def test_several_formats(graph: Graph, write: Write) -> None:
    overrides: dict[str, str | None] = {"*.mlp.*": "w8a16", "*.down_proj": None, "lm_head": "w4a16-g32-asym"}
    directory, report, result = write(graph, "fp8-dynamic", overrides=overrides)
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    found = config["quantization_config"]
    assert (found["format"], found["ignore"]) == ("mixed-precision", [DOWN])
    formats = {name: fields["format"] for fields in found["config_groups"].values() for name in fields["targets"]}
    assert formats[QUERY] == "float-quantized"
    assert formats["model.layers.0.mlp.up_proj"] == formats["lm_head"] == "pack-quantized"
    assert formats.keys() == {site.name for site in graph.sites()} - {DOWN}
    assert tensors[f"{DOWN}.weight"].dtype == torch.bfloat16
    for name, bits in (("model.layers.0.mlp.up_proj", 8), ("lm_head", 4)):
        np.testing.assert_array_equal(unpacking.packed_integers(tensors, name, bits), native_weight(result.graph, name))
    assert report["parity"]["max_difference"] < NEAR


FP8 = QuantSpec("float8_e4m3fn", "per_channel", None)


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        (Scheme.parse("w4a16"), 256, "fused"),
        (Scheme.parse("w4a16-g16"), 256, "writes-only"),
        (Scheme.parse("w4a16-g100"), 256, "refused"),
        (Scheme.parse("w4a16-lut"), 256, "refused"),
        (Scheme.parse("fp8-e5m2"), 256, "refused"),
        (Scheme.parse("w4a4-clip90"), 256, "refused"),
        (Scheme.parse("nvfp4"), 72, "refused"),
        (Scheme.parse("nvfp4"), 8, "refused"),
        (Scheme.parse("w8a8"), 256, "fused"),
        (Scheme.parse("w8a8-asym"), 256, "writes-only"),
        (Scheme(Scheme.parse("nvfp4").weight, Scheme.parse("fp8").activation), 256, "refused"),
        (Scheme(FP8, Scheme.parse("mxfp4").activation), 256, "refused"),
        (Scheme(FP8), 256, "fused"),
        (Scheme(None, Scheme.parse("fp8").activation), 256, "refused"),
    ],
    ids=str,
)
def test_what_is_taken(scheme: Scheme, width: int, status: str) -> None:
    assert supports(scheme, width).status == status
