"""The layout of GPTQ: unpacked number by number, its configuration, and what it cannot hold."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.gptq import supports
from qcompiler.numerics import Scheme
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TARGET = "checkpoint:format=gptq"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", ["-g32", "-channel"])
def test_values(bits: int, options: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, f"w{bits}a16{options}", TARGET)
    tensors, groups = unpacking.read_tensors(directory), 5 if options == "-g32" else 1
    own = {name.removeprefix(f"{DOWN}."): t for name, t in tensors.items() if name.startswith(DOWN)}
    assert {name: (t.dtype, list(t.shape)) for name, t in own.items()} == {
        "qweight": (torch.int32, [160 * bits // 32, 64]),
        "qzeros": (torch.int32, [groups, 64 * bits // 32]),
        "scales": (torch.float16, [groups, 64]),
        "g_idx": (torch.int32, [160]),
    }
    for name in (QUERY, DOWN):
        np.testing.assert_array_equal(unpacking.gptq(tensors, name, bits), native_weight(result.graph, name))
    config = unpacking.read_config(directory)["quantization_config"]
    assert json.loads((directory / "quantize_config.json").read_text()) == config
    assert config == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32 if groups > 1 else -1,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert report["parity"]["max_difference"] < 1e-5
    assert "qcompiler reads it back" in report["notes"][0]


def test_several_formats(graph: Graph, write: Write) -> None:
    overrides: dict[str, str | None] = {"*.down_proj": "w8a16", "*.o_proj": None}
    directory, _, result = write(graph, "w4a16-g32", TARGET, overrides=overrides)
    dynamic = unpacking.read_config(directory)["quantization_config"]["dynamic"]

    def fields(name: str) -> dict[str, Any] | None:
        """As readers look them up."""
        for pattern, found in dynamic.items():
            if re.match(pattern[2:], name):
                return None if pattern.startswith("-:") else found
        return {}

    assert fields(DOWN) == {"bits": 8, "group_size": -1}
    assert fields("model.layers.0.self_attn.o_proj") is None
    assert fields("model.layers.0.self_attn.q_proj") == {}
    tensors = unpacking.read_tensors(directory)
    assert "model.layers.0.self_attn.o_proj.weight" in tensors
    np.testing.assert_array_equal(unpacking.gptq(tensors, DOWN, 8), native_weight(result.graph, DOWN))


@pytest.mark.parametrize("factor", [1e-6, 1e8])
def test_scales_that_float16_does_not_hold(factor: float, graph: Graph, tmp_path: Any) -> None:
    result = compiled(graph, passes_of("w4a16-g32"), TARGET)
    scale = result.graph.weights.read(f"{DOWN}.weight_scale")
    result.graph.weights.set(f"{DOWN}.weight_scale", scale * factor)
    with pytest.raises(TargetError, match="float16") as caught:
        qc.lower(result, TARGET, tmp_path / "out")
    assert caught.value.where == f"checkpoint: {DOWN}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        ("w4a16", 256, "fused"),
        ("w8a16", 256, "fused"),
        ("w4a16-g16", 256, "writes-only"),
        ("w4a16-g100", 256, "refused"),
        ("w4a16-channel", 100, "refused"),
        ("w4a16-asym", 256, "refused"),
        ("w3a16", 256, "refused"),
        ("w4a16-tensor", 256, "refused"),
        ("w8a8", 256, "refused"),
        ("fp8", 256, "refused"),
    ],
)
def test_what_is_taken(scheme: str, width: int, status: str) -> None:
    assert supports(Scheme.parse(scheme), width).status == status


def test_rows_that_fill_no_words_are_refused_ahead_of_calibration(graph: Graph) -> None:
    with pytest.raises(TargetError, match="whole words") as caught:
        compiled(graph, passes_of("w4a16-g32", {"lm_head": "w4a16-g32"}), TARGET)
    assert (caught.value.where, caught.value.expected) == ("checkpoint: lm_head", "a multiple of 8")
