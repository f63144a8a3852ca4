"""`Rotate` in a pipeline: exact as declared, reported, and worth it where channels stand out."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch

import qcompiler as qc
from qcompiler.api import compile as compile_model
from qcompiler.errors import PipelineError, RecipeError, VerificationError
from qcompiler.ir.graph import Graph, is_op
from qcompiler.lowering.onnx import OnnxArtifact
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ, Rotate
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
)
from qcompiler.protocol.pipeline import Pipeline
from tests.models import VOCABULARY, build, canonical_graph, copy_graph, language_inputs, padding_mask, run, tolerance
from tests.tiny_graphs import residual_mlp

CPU = torch.device("cpu")
hadamard = torch.ops.qcompiler.hadamard.default


def logits(graph: Graph) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    return run(graph, **language_inputs(graph, ids, padding_mask(2, 9, "none")))["logits"]


def rotated(graph: Graph, item: Rotate | None = None, seed: int = 0) -> PassResult:
    return (item or Rotate()).run(graph, PassContext(graph, CPU, seed))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2", "gpt_neox"])
def test_the_model_computes_the_same_from_other_weights(family):
    graph = copy_graph(canonical_graph(family))
    before = {site.name: graph.weights.read(site.weight) for site in graph.sites()}
    expected = logits(graph)
    result = rotated(graph)
    assert result.modified
    assert not result.skips
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)
    for site in graph.sites():
        assert not torch.allclose(graph.weights.read(site.weight), before[site.name], atol=1e-2), site.name
    assert {region["kind"] for region in result.regions} == {
        "rotation: residual stream",
        "rotation: value heads",
        "rotation: at run time",
    }
    assert all(region["status"] != "refused" for region in result.regions)


@pytest.mark.parametrize("family", ["gemma3", "bloom"])
def test_a_refused_stream_is_left_as_it_is_and_named(family):
    graph = copy_graph(canonical_graph(family))
    expected = logits(graph)
    tables = {name: graph.weights.read(name) for name in graph.weight_names() if "embed" in name}
    result = rotated(graph)
    (skip,) = result.skips
    assert "norm" in skip.site
    assert "is not rotated: " in skip.reason
    assert not skip.asked
    assert [r["reason"] for r in result.regions if r["status"] == "refused"] == [skip.reason.partition(": ")[2]]
    assert all(torch.equal(graph.weights.read(name), table) for name, table in tables.items())
    assert sum(r["kind"] == "rotation: value heads" for r in result.regions) == 2  # these are rotated all the same
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)


def test_strict_refuses():
    with pytest.raises(RecipeError, match="strict") as caught:
        compile_model(
            build("gemma3"), [Assign("w4a8-g16-dynamic"), Rotate(), RTN(), InsertQDQ(observer=None)], strict=True
        )
    assert "post_attention_layernorm" in str(caught.value)


def test_a_model_without_a_stream():
    graph = residual_mlp()
    result = rotated(graph, Rotate(online_down=False))
    assert not result.modified
    assert [skip.reason for skip in result.skips] == [
        "residual stream is not rotated: no embedding table begins a residual stream"
    ]


@pytest.mark.parametrize(
    ("options", "block", "reason"),
    [
        (
            {"hidden_size": 92, "num_attention_heads": 2, "head_dim": 46},
            4,
            "no Hadamard matrix of order 92: blocks of 4",
        ),
        ({"hidden_size": 48}, 48, ""),
    ],
)
def test_widths(options, block, reason):
    graph = qc.capture(build("llama", layers=1, **options))
    expected = logits(graph)
    result = rotated(graph)
    (stream,) = (region for region in result.regions if region["kind"] == "rotation: residual stream")
    assert (stream["details"]["block"], stream["reason"]) == (block, reason)
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)


def test_odd_widths_are_refused():
    graph = qc.capture(
        build("llama", layers=1, hidden_size=15, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    )
    result = rotated(graph)
    (skip,) = result.skips
    assert skip.site == "model.embed_tokens.weight"
    assert "no Hadamard matrix but that of order 1 divides 15 channels" in skip.reason


def test_tied_tables_are_reported():
    result = rotated(copy_graph(canonical_graph("gpt2")))
    assert result.regions[0]["details"]["untied"] == ["transformer.wte.weight"]
    assert result.regions[0]["details"]["mean removed"]


def test_options():
    graph = copy_graph(canonical_graph("llama"))
    names = {region["kind"] for region in rotated(graph, Rotate(residual=False, value_heads=False)).regions}
    assert names == {"rotation: at run time"}
    graph = copy_graph(canonical_graph("llama"))
    rotated(graph, Rotate(online_down=False))
    assert not any(is_op(node, hadamard) for node in graph.fx.nodes)
    graph = copy_graph(canonical_graph("llama"))
    expected = logits(graph)
    rotated(graph, Rotate(online_heads=True))
    assert sum(is_op(node, hadamard) for node in graph.fx.nodes) == 4
    assert (logits(graph) - expected).abs().max() <= tolerance(expected)


def test_inputs_that_stay_in_float_are_not_rotated_at_run_time():
    graph = copy_graph(canonical_graph("llama"))
    Assign("w4a16-g16").run(graph, PassContext(graph, CPU, 0))
    rotated(graph)
    assert not any(is_op(node, hadamard) for node in graph.fx.nodes)


def test_the_seed_decides():
    def table(seed: int) -> torch.Tensor:
        graph = copy_graph(canonical_graph("llama"))
        rotated(graph, seed=seed)
        return graph.weights.read("model.embed_tokens.weight")

    assert torch.equal(table(0), table(0))
    assert not torch.equal(table(0), table(1))


@dataclasses.dataclass(frozen=True)
class Doubled(Pass):
    """Says it is exact, and is not."""

    effect: ClassVar[Effect] = Effect.EXACT

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        name = graph.sites()[0].weight
        graph.rewrite_float(name, 2 * graph.weights.read(name))
        return PassResult(True)


def test_a_pass_on_the_whole_graph_is_held_to_exactness():
    with pytest.raises(VerificationError, match="declared exact") as caught:
        compile_model(build("llama", layers=1), [Assign("w8a16"), Doubled(), RTN()])
    assert "doubled" in str(caught.value)


def test_order_in_a_pipeline():
    Pipeline([Assign("w4a4"), Rotate(), InsertQDQ(observer=None), GPTQ()])
    with pytest.raises(PipelineError, match="cannot run in this order"):
        Pipeline([Assign("w4a4"), RTN(), Rotate()])


def with_outliers() -> torch.nn.Module:
    """Three channels of every norm 40 times as large, the columns behind them as much smaller."""
    model = build("llama")
    layers: Any = model.get_submodule("model.layers")
    with torch.no_grad():
        for layer in layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[3, 11, 20]] *= 40
                for reader in readers:
                    reader.weight[:, [3, 11, 20]] /= 40
    return model


def test_four_bits_are_enough_where_channels_stand_out():
    ids = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))
    model = with_outliers()
    graph = qc.capture(model)
    expected = model(ids).logits.detach()

    def error(*rotation: Pass) -> float:
        recipe = [Assign("w4a4-channel"), *rotation, RTN(), InsertQDQ(observer=None)]
        result = compile_model(copy_graph(graph), recipe)
        return float((result.artifact().forward(ids) - expected).square().mean() / expected.square().mean())

    assert error(Rotate()) < error() / 4


def test_saved_and_loaded(tmp_path):
    ids = torch.randint(VOCABULARY, (1, 8))
    result = compile_model(build("gpt2"), [Assign("w4a4-channel-clip90"), Rotate(), RTN(), InsertQDQ(observer=None)])
    expected = result.artifact().forward(ids)
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    assert torch.equal(loaded.artifact().forward(ids), expected)
    assert any(is_op(node, hadamard) for node in loaded.graph.fx.nodes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_onnx_runtime_computes_the_same(family, tmp_path):
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(4))
    recipe = [Assign("w4a8-channel-dynamic"), Rotate(online_heads=True), RTN(), InsertQDQ(observer=None)]
    result = compile_model(copy_graph(canonical_graph(family)), recipe)
    qc.lower(result, "onnx", tmp_path / "onnx")
    expected = result.artifact().forward(ids)
    found = OnnxArtifact(tmp_path / "onnx").forward(ids)
    assert (found - expected).square().mean() <= 1e-4 * expected.square().mean()  # a code may fall to the other side


def test_what_stays_in_float_is_stored_as_in_the_source():
    result = compile_model(
        build("llama").bfloat16(), [Assign("w4a4-channel"), Rotate(), RTN(), InsertQDQ(observer=None)]
    )
    weights = result.graph.weights
    assert weights.info("model.embed_tokens.weight").dtype == "bfloat16"
    assert weights.info("lm_head.weight").dtype == "bfloat16"
    assert weights.info("model.layers.0.self_attn.q_proj.weight_scale").dtype == "bfloat16"
