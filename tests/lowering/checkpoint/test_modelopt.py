"""ModelOpt's layout: unpacked number by number, its two configurations, and what it cannot hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.artifacts import HFArtifact
from qcompiler.errors import TargetError, UnsupportedModelError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.modelopt import supports
from qcompiler.numerics import Scheme
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TARGET = "checkpoint:format=modelopt"


def configurations(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of ``config.json`` and of ``hf_quant_config.json``, which name one algorithm and the same layers."""
    own = unpacking.read_config(directory)["quantization_config"]
    beside = json.loads((directory / "hf_quant_config.json").read_text())
    assert own["quant_method"] == beside["producer"]["name"] == "modelopt"
    assert own["quant_algo"] == beside["quantization"]["quant_algo"]
    assert own["ignore"] == beside["quantization"]["exclude_modules"] == ["lm_head"]
    assert own["config_groups"]["group_0"]["targets"] == ["Linear"]
    return own, beside["quantization"]


@pytest.mark.parametrize(("scheme", "algorithm"), [("fp8-tensor", "FP8"), ("fp8-dynamic", "FP8_PER_CHANNEL_PER_TOKEN")])
def test_floats_of_eight_bits(scheme: str, algorithm: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme, TARGET)
    tensors = unpacking.read_tensors(directory)
    own, beside = configurations(directory)
    assert beside == {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    scale = tensors[f"{DOWN}.weight_scale"]
    assert (scale.dtype, list(scale.shape)) == (torch.float32, [] if scheme == "fp8-tensor" else [64])
    codes = unpacking.e4m3_matrix(tensors[f"{DOWN}.weight"])
    found = unpacking.scaled(codes, scale.reshape(-1, 1).numpy())
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    if scheme == "fp8-tensor":
        assert torch.equal(tensors[f"{DOWN}.input_scale"], result.graph.weights.read(f"{DOWN}.input_scale"))
        assert own["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    else:
        assert f"{DOWN}.input_scale" not in tensors
        assert own["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert report["notes"] == ["compared as qcompiler reads it back: transformers does not read modelopt"]
    assert report["parity"]["max_difference"] < 1e-4


@pytest.mark.parametrize(("scheme", "algorithm"), [("nvfp4", "NVFP4"), ("nvfp4a16", "W4A16_NVFP4")])
def test_floats_of_four_bits(scheme: str, algorithm: str, graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, scheme, TARGET)
    tensors = unpacking.read_tensors(directory)
    own, beside = configurations(directory)
    assert (beside["quant_algo"], beside["group_size"]) == (algorithm, 16)
    assert own["config_groups"]["group_0"]["weights"]["group_size"] == 16
    weight, scale, factor = (tensors[f"{DOWN}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
    assert (weight.dtype, list(weight.shape)) == (torch.uint8, [64, 80])
    assert (scale.dtype, list(scale.shape)) == (torch.float8_e4m3fn, [64, 10])
    assert (factor.dtype, list(factor.shape)) == (torch.float32, [])
    found = unpacking.scaled(unpacking.fp4_matrix(weight), unpacking.e4m3_matrix(scale) * factor.numpy())
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    assert (f"{DOWN}.input_scale" in tensors) is (scheme == "nvfp4")
    if scheme == "nvfp4":
        assert torch.equal(tensors[f"{DOWN}.input_scale"], result.graph.weights.read(f"{DOWN}.input_scale"))


def test_integers_of_four_bits(graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, "w4a16-g32", TARGET)
    tensors = unpacking.read_tensors(directory)
    _, beside = configurations(directory)
    assert (beside["quant_algo"], beside["group_size"], beside["has_zero_point"]) == ("W4A16_AWQ", 32, False)
    packed, scale = tensors[f"{DOWN}.weight"].tolist(), tensors[f"{DOWN}.weight_scale"]
    assert (len(packed), len(packed[0])) == (32, 160)
    assert (scale.dtype, list(scale.shape)) == (torch.float32, [64, 5])
    values = [[(byte >> 4 * (row % 2)) & 15 for byte in packed[row // 2]] for row in range(64)]
    signed = [[value - 16 if value > 7 else value for value in line] for line in values]
    np.testing.assert_array_equal(unpacking.scaled(signed, scale.numpy()), native_weight(result.graph, DOWN))


def test_transformers_would_take_codes_for_weights(graph: Graph, write: Write) -> None:
    directory, *_ = write(graph, "fp8-tensor", TARGET)
    with pytest.raises(UnsupportedModelError, match="plain weights"):
        HFArtifact(directory)


def test_blocks_of_floats(wide_graph: Graph, write: Write) -> None:
    directory, report, result = write(wide_graph, "fp8-block-dyngroup", TARGET)
    tensors = unpacking.read_tensors(directory)
    _, beside = configurations(directory)
    assert (beside["quant_algo"], beside["group_size"]) == ("FP8_PB_WO", 128)
    scale = tensors[f"{DOWN}.weight_scale"]
    assert (scale.dtype, list(scale.shape)) == (torch.float32, [1, 1, 2, 1])
    codes = unpacking.e4m3_matrix(tensors[f"{DOWN}.weight"])
    found = unpacking.scaled(np.asarray(codes), np.repeat(scale.reshape(1, 2).numpy(), 128, axis=1))
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    assert f"{DOWN}.input_scale" not in tensors
    assert report["parity"]["max_difference"] < 1e-4


def test_integers_of_eight_bits(graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "w8a8-actsym", TARGET)
    tensors = unpacking.read_tensors(directory)
    _, beside = configurations(directory)
    assert beside["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    codes, scale = tensors[f"{DOWN}.weight"], tensors[f"{DOWN}.weight_scale"]
    assert (codes.dtype, scale.dtype, list(scale.shape)) == (torch.int8, torch.float32, [64])
    found = unpacking.scaled(codes.numpy().astype(np.int64), scale.reshape(-1, 1).numpy())
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    assert torch.equal(tensors[f"{DOWN}.input_scale"], result.graph.weights.read(f"{DOWN}.input_scale"))
    assert report["parity"]["max_difference"] < 1e-4


def test_several_formats(graph: Graph, write: Write) -> None:
    overrides = {"*.down_proj": "nvfp4a16", "*.o_proj": "w4a16-g32", "lm_head": None}
    directory, report, result = write(graph, "fp8-dynamic", TARGET, overrides=overrides)
    own = unpacking.read_config(directory)["quantization_config"]
    beside = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    assert own["quant_algo"] == beside["quant_algo"] == "MIXED_PRECISION"
    assert own["quantized_layers"] == beside["quantized_layers"]
    layers = own["quantized_layers"]
    assert layers[QUERY] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert layers[DOWN] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers[DOWN.replace("mlp.down_proj", "self_attn.o_proj")]["quant_algo"] == "W4A16_AWQ"
    assert len(layers) == 7
    assert sorted(name for group in own["config_groups"].values() for name in group["targets"]) == sorted(layers)
    weight, scale, factor = (
        unpacking.read_tensors(directory)[f"{DOWN}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")
    )
    found = unpacking.scaled(unpacking.fp4_matrix(weight), unpacking.e4m3_matrix(scale) * factor.numpy())
    np.testing.assert_array_equal(found, native_weight(result.graph, DOWN))
    assert report["parity"]["max_difference"] < 1e-4


def test_rows_that_fill_no_bytes_are_refused_ahead_of_calibration(graph: Graph) -> None:
    with pytest.raises(TargetError, match="whole bytes") as caught:
        compiled(graph, passes_of("w4a16-g32", {"lm_head": "w4a16-g32"}), TARGET)
    assert caught.value.got == "61 output channels"


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        ("fp8-tensor", 256, "fused"),
        ("fp8-dynamic", 256, "fused"),
        ("fp8", 256, "refused"),
        ("fp8-block", 256, "refused"),
        ("fp8-block-dyngroup", 256, "fused"),
        ("fp8-block-dyngroup", 576, "refused"),
        ("w8a8-actsym", 256, "fused"),
        ("w8a8", 256, "refused"),
        ("w8a8-dynamic", 256, "refused"),
        ("fp8-e5m2-tensor", 256, "refused"),
        ("nvfp4", 256, "fused"),
        ("nvfp4", 72, "refused"),
        ("mxfp4", 256, "refused"),
        ("w4a16", 256, "fused"),
        ("w4a16", 160, "refused"),
        ("w4a16-asym", 256, "refused"),
        ("w8a16", 256, "refused"),
    ],
)
def test_what_is_taken(scheme: str, width: int, status: str) -> None:
    assert supports(Scheme.parse(scheme), width).status == status
