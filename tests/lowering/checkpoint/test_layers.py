"""What is refused in any layout, ahead of calibration, and which layers engines fuse."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.layers import fused_layers
from qcompiler.passes import RTN, Assign, InsertQDQ, QuantizeKVCache, Rotate
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, passes_of, save_source
from tests.models import model_of

BLOCK = "model.layers.0"
QKV = [f"{BLOCK}.self_attn.{part}_proj" for part in "qkv"]
GATED = [f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"]


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_layers_that_read_one_value(scheme: str, graph: Graph) -> None:
    assert fused_layers(graph) == [QKV, GATED]
    assert fused_layers(compiled(graph, passes_of(scheme), "checkpoint").graph) == [QKV, GATED]


@pytest.mark.parametrize(
    ("pattern", "scheme", "names", "got"),
    [
        ("*.v_proj", None, QKV, f"{QKV[0]}: int4 g32 symmetric, activation float; {QKV[2]}: float"),
        ("*.up_proj", "w8a16", GATED, "int8 per_channel symmetric, activation float"),
        ("*.gate_proj", "w4a16-g32-asym", GATED, "int4 g32 asymmetric, activation float"),
    ],
)
def test_formats_that_engines_cannot_fuse(
    pattern: str, scheme: str | None, names: list[str], got: str, graph: Graph, tmp_path: Path
) -> None:
    passes = passes_of("w4a16-g32", {pattern: scheme})
    with pytest.raises(TargetError, match="read one value") as caught:
        compiled(graph, passes, "checkpoint")
    assert caught.value.where == f"checkpoint: {', '.join(names)}"
    assert got in str(caught.value.got)
    assert caught.value.remedy == "let the overrides name all of them, or none"
    result = qc.compile(graph, passes)
    with pytest.raises(TargetError, match="read one value"):
        qc.lower(result, "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_rotated_at_run_time(graph: Graph) -> None:
    with pytest.raises(TargetError, match="rotates values at run time") as caught:
        qc.compile(graph, [Assign("w8a8-dynamic"), Rotate(), InsertQDQ(observer=None), RTN()], targets=["checkpoint"])
    assert caught.value.remedy == "use Rotate() without online rotations, or another recipe"


def test_rotations_that_are_folded_in(graph: Graph, tmp_path: Path) -> None:
    result = qc.compile(graph, [Assign("w4a16-g32"), Rotate(online_down=False), RTN()], targets=["checkpoint"])
    report = qc.lower(result, "checkpoint", tmp_path / "out")
    assert report["parity"]["max_difference"] < 1e-5


def test_layers_that_are_no_linear_ones(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "gpt2")
    with pytest.raises(TargetError, match="no linear layer of the model") as caught:
        qc.compile(source, [RTN(bits=8)], targets=["checkpoint"])
    assert (caught.value.where, caught.value.got) == ("checkpoint: transformer.h.0.attn.c_attn", "Conv1D")


def test_tensors_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", "llama")
    graph = qc.capture(source)
    name = f"{BLOCK}.input_layernorm.weight"
    graph.weights.alias("another.weight", name)
    next(node for node in graph.fx.nodes if node.op == "get_attr" and node.target == name).target = "another.weight"
    with pytest.raises(TargetError, match="no place for"):
        qc.compile(graph, [RTN(bits=8)], targets=["checkpoint"])


def test_models_in_memory() -> None:
    with pytest.raises(TargetError, match="from a Hugging Face directory"):
        qc.compile(model_of("llama"), [RTN(bits=8)], targets=["checkpoint"])


def test_schemes_and_caches_that_were_not_asked_about(graph: Graph, tmp_path: Path) -> None:
    """Compiled without the target, and lowered to it all the same."""
    given: list[tuple[list[Any], str]] = [
        ([Assign("fp8-e5m2"), *passes_of("fp8-e5m2")[1:]], "does not take this scheme"),
        ([Assign("w8a16"), QuantizeKVCache("int8"), RTN()], "cache of this format"),
    ]
    tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(1))
    for passes, what in given:
        result = qc.compile(graph, passes, qc.Calibration.from_tokens(tokens))
        with pytest.raises(TargetError, match=what):
            qc.lower(result, "checkpoint", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wide_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Hidden 192, which 128 does not divide, and intermediate 256."""
    sizes: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256, "vocab_size": 64}
    return qc.capture(save_source(tmp_path_factory.mktemp("wide"), **sizes))


@pytest.mark.parametrize(
    ("form", "scheme", "down"),
    [
        ("compressed-tensors", "w4a16-asym", 128),
        ("gptq", "w4a16", 128),
        ("awq", "w4a16", 64),
        ("modelopt", "w4a16", 64),
    ],
)
def test_a_default_group_that_does_not_divide_a_width(
    form: str, scheme: str, down: int, wide_graph: Graph, write: Write
) -> None:
    directory, report, result = write(wide_graph, scheme, f"checkpoint:format={form}")
    sizes = {name: scheme.weight.group_size for name, scheme in result.graph.schemes.items() if scheme.weight}
    assert sizes == {**dict.fromkeys(sizes, 64), f"{BLOCK}.mlp.down_proj": down}
    (note,) = (note for note in result.report.notes if "the default" in note)
    assert note.startswith(f"groups of 64 instead of 128, the default, in {6 if down == 128 else 7} layers ({QKV[0]}")
    scales = {"gptq": "scales", "awq": "scales"}.get(form, "weight_scale")
    shape = list(unpacking.read_tensors(directory)[f"{QKV[0]}.{scales}"].shape)
    assert shape == ([3, 192] if scales == "scales" else [192, 3])
    assert form == "modelopt" or report["parity"]["max_difference"] < 1e-5


def test_a_group_that_was_asked_for_and_does_not_divide_a_width(wide_graph: Graph) -> None:
    for form in ("compressed-tensors", "gptq", "awq", "modelopt"):
        with pytest.raises(TargetError, match="do not divide 192") as caught:
            compiled(wide_graph, passes_of("w4a16-g128"), f"checkpoint:format={form}")
        assert str(caught.value.remedy).startswith("choose groups of 64")


def test_blocks_of_floats_that_do_not_divide_a_width(odd_graph: Graph) -> None:
    with pytest.raises(TargetError, match="blocks of 16 do not divide 72") as caught:
        compiled(odd_graph, passes_of("nvfp4a16"), "checkpoint")
    assert str(caught.value.remedy).startswith("leave the layer in float")
