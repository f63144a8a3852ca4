"""The layout of AWQ: unpacked number by number, its configuration, and what it cannot hold."""

import numpy as np
import pytest
import torch

from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.awq import supports
from qcompiler.numerics import Scheme
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TARGET = "checkpoint:format=awq"


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym", "w4a16-channel", "w4a16-channel-asym"])
def test_values(scheme: str, graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, scheme, TARGET)
    tensors, groups = unpacking.read_tensors(directory), 5 if "g32" in scheme else 1
    own = {name.removeprefix(f"{DOWN}."): t for name, t in tensors.items() if name.startswith(DOWN)}
    assert {name: (t.dtype, list(t.shape)) for name, t in own.items()} == {
        "qweight": (torch.int32, [160, 8]),
        "qzeros": (torch.int32, [groups, 8]),
        "scales": (torch.float16, [groups, 64]),
    }
    for name in (QUERY, DOWN):
        np.testing.assert_array_equal(unpacking.awq(tensors, name), native_weight(result.graph, name))
    assert unpacking.read_config(directory)["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32 if groups > 1 else -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert report["parity"]["max_difference"] < 1e-5
    assert "qcompiler reads it back" in report["notes"][0]


def test_groups_of_several_sizes_are_refused_ahead_of_calibration(graph: Graph) -> None:
    with pytest.raises(TargetError, match="one size of groups") as caught:
        compiled(graph, passes_of("w4a16-g32", {"*.down_proj": "w4a16-channel"}), TARGET)
    assert (caught.value.where, caught.value.got) == (f"checkpoint: {DOWN}", "groups of 160")


def test_a_layer_as_wide_as_a_group(graph: Graph, write: Write) -> None:
    """Down projections have 160 input channels, the others 64: as one group of 64 there is one scale to a row."""
    overrides = {"*.down_proj": None}
    directory, _, result = write(graph, "w4a16-g64", TARGET, overrides=overrides)
    assert unpacking.read_config(directory)["quantization_config"]["group_size"] == -1
    tensors = unpacking.read_tensors(directory)
    np.testing.assert_array_equal(unpacking.awq(tensors, QUERY), native_weight(result.graph, QUERY))


def test_rows_that_fill_no_words_are_refused_ahead_of_calibration(graph: Graph) -> None:
    with pytest.raises(TargetError, match="whole words") as caught:
        compiled(graph, passes_of("w4a16-g32", {"lm_head": "w4a16-g32"}), TARGET)
    assert (caught.value.where, caught.value.got) == ("checkpoint: lm_head", "61 output channels")


@pytest.mark.parametrize(
    ("scheme", "width", "status"),
    [
        ("w4a16", 256, "fused"),
        ("w4a16-asym", 256, "fused"),
        ("w4a16-g16", 256, "writes-only"),
        ("w4a16-g100", 256, "refused"),
        ("w8a16", 256, "refused"),
        ("w4a16-tensor", 256, "refused"),
        ("w4a16-lut", 256, "refused"),
        ("w4a8", 256, "refused"),
        ("nvfp4a16", 256, "refused"),
    ],
)
def test_what_is_taken(scheme: str, width: int, status: str) -> None:
    assert supports(Scheme.parse(scheme), width).status == status
