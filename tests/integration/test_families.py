"""Families of models, none of which the code knows: captured, recognised to the last operator, quantized, lowered."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.ir import segments
from qcompiler.ir.graph import Graph, is_op
from qcompiler.ir.segments import segment_graph
from qcompiler.passes import GPTQ
from tests.families import NAMED, OTHERS, VOCABULARY, WINDOW
from tests.models import (
    canonical_graph,
    copy_graph,
    language_inputs,
    model_of,
    operators,
    padding_mask,
    reasons,
    run,
    tolerance,
)

canonical = torch.ops.qcompiler
LAYERS = 2
EXPERTS = 4

_DECODER = {"kv_append": 4, "attention": 2}
_ROTARY = {**_DECODER, "rotary": 4}
_ROUTED = {"take_expert": 16, "merge_experts": 4}
EXPECTED = {
    "llama": {**_ROTARY, "linear": 15, "rms_norm": 5},
    "mistral": {**_ROTARY, "linear": 15, "rms_norm": 5},
    "qwen2": {**_ROTARY, "linear": 15, "rms_norm": 5},
    "qwen3": {**_ROTARY, "linear": 15, "rms_norm": 9},  # of queries and keys, too
    "gemma2": {**_ROTARY, "linear": 15, "rms_norm": 9},  # before and behind each block
    "gemma3": {**_ROTARY, "linear": 15, "rms_norm": 13},
    "phi": {**_ROTARY, "linear": 13, "layer_norm": 3},
    "phi3": {**_ROTARY, "linear": 9, "rms_norm": 5},
    "gpt2": {**_DECODER, "linear": 9, "layer_norm": 5},
    "opt": {**_DECODER, "linear": 13, "layer_norm": 5},
    "gpt_neox": {**_ROTARY, "linear": 9, "layer_norm": 5},
    "mixtral": {**_ROTARY, **_ROUTED, "linear": 27, "rms_norm": 5},
    "bert": {"attention": 2, "linear": 14, "layer_norm": 6},
    "gptj": {**_ROTARY, "linear": 13, "layer_norm": 3},
    "bloom": {**_DECODER, "linear": 9, "layer_norm": 6},
    "falcon": {**_ROTARY, "linear": 9, "layer_norm": 3},
    "cohere": {**_ROTARY, "linear": 15, "layer_norm": 3},
    "stablelm": {**_ROTARY, "linear": 15, "layer_norm": 5},
    "olmo": {**_ROTARY, "linear": 15, "layer_norm": 5},
    "olmo2": {**_ROTARY, "linear": 15, "rms_norm": 9},
    "granite": {**_ROTARY, "linear": 15, "rms_norm": 5},
    "starcoder2": {**_ROTARY, "linear": 13, "layer_norm": 5},
    "gpt_neo": {**_DECODER, "linear": 13, "layer_norm": 5},
    "codegen": {**_ROTARY, "linear": 9, "layer_norm": 3},
    "mpt": {**_DECODER, "linear": 9, "layer_norm": 5},
    "falcon_alibi": {**_DECODER, "linear": 9, "layer_norm": 5},
    "glm4": {**_ROTARY, "linear": 13, "rms_norm": 9},
    "cohere_qk": {**_ROTARY, "linear": 15, "layer_norm": 3 + 2 * LAYERS},  # those of queries and keys without a weight
    "qwen2_moe": {**_ROTARY, **_ROUTED, "linear": 35, "rms_norm": 5},
    "qwen3_moe": {**_ROTARY, **_ROUTED, "linear": 27, "rms_norm": 9},
    "gpt_oss": {**_ROTARY, **_ROUTED, "linear": 27, "rms_norm": 5, "attention": 0},
    "deepseek_v3": {**_ROTARY, "take_expert": 8, "merge_experts": 2, "linear": 26, "rms_norm": 9},
    "roberta": {"attention": 2, "linear": 14, "layer_norm": 6},
    "nemotron": {**_ROTARY, "linear": 13, "layer_norm": 5},
    "persimmon": {**_ROTARY, "linear": 9, "layer_norm": 9},
}
_SLOPES = [("attention-mask", "the mask adds other values than zero and minus infinity")] * LAYERS
LEFT = {
    "bloom": _SLOPES,
    "mpt": _SLOPES,
    "falcon_alibi": _SLOPES,
    "gpt_oss": [("attention", "some of the weights belong to no key")] * LAYERS,
}

every_family = pytest.mark.parametrize(
    "family", [*NAMED, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
)


def calls(family: str, target: object) -> list[Any]:
    return [node for node in canonical_graph(family).fx.nodes if is_op(node, target)]


@every_family
def test_everything_is_recognised(family: str) -> None:
    graph = canonical_graph(family)
    ours = {name.removeprefix("qcompiler."): n for name, n in operators(graph).items() if name.startswith("qcompiler.")}
    assert ours == {name: count for name, count in EXPECTED[family].items() if count}
    assert reasons(graph) == LEFT.get(family, [])


@functools.cache
def expected_logits(family: str, side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = padding_mask(3, 11, side)
    given = {"input_ids": ids, "attention_mask": mask}
    if canonical_graph(family).signature.input("positions") is not None:
        given["position_ids"] = torch.arange(11).expand(3, 11)
    with torch.no_grad():
        return ids, mask, model_of(family)(**given).logits


@pytest.mark.parametrize("side", ["none", "left"])
@every_family
def test_logits_are_those_of_transformers(family: str, side: str) -> None:
    graph = canonical_graph(family)
    ids, mask, expected = expected_logits(family, side)
    real = mask.bool()
    found = run(graph, **language_inputs(graph, ids, mask))["logits"]
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("side", ["none", "left"])
@every_family
def test_decoding_with_the_cache(family: str, side: str) -> None:
    graph = canonical_graph(family)
    if not graph.signature.has_cache:
        pytest.skip("an encoder")
    ids, mask, expected = expected_logits(family, side)
    past, start = None, 0
    for end in (4, 9, 10, 11):
        out = run(graph, **language_inputs(graph, ids[:, start:end], mask[:, :end], past))
        past = {name: value for name, value in out.items() if name.startswith("present")}
        real = mask[:, start:end].bool()
        wanted = expected[:, start:end][real]
        torch.testing.assert_close(out["logits"][real], wanted, rtol=0, atol=tolerance(expected))
        start = end


@every_family
def test_sites_go_by_the_names_of_parameters(family: str) -> None:
    parameters = dict(model_of(family).named_parameters(remove_duplicate=False))
    for site in canonical_graph(family).sites():
        stack, _, index = site.name.rpartition(".")
        if stack in parameters:
            assert 0 <= int(index) < EXPERTS
            assert {site.out_features, site.in_features} == set(parameters[stack].shape[1:])
        else:
            assert f"{site.name}.weight" in parameters


@every_family
def test_a_cut_at_every_residual_block(family: str) -> None:
    cut = segment_graph(canonical_graph(family))
    assert len(cut.segments) > LAYERS
    assert [len(segment.outputs) for segment in cut.segments] == [1] * len(cut.segments)
    busiest = max(len(segment.sites) for segment in cut.segments)
    assert busiest <= len(canonical_graph(family).sites()) // LAYERS


@every_family
def test_compiled_and_lowered(family: str, tmp_path: Path) -> None:
    graph: Graph = copy_graph(canonical_graph(family))
    tokens = torch.randint(1, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(5))
    result = qc.compile(graph, [GPTQ(bits=4, group_size=16)], qc.Calibration.from_tokens(tokens))
    done, left = {site.site for site in result.report.sites}, {skip.site for skip in result.report.skipped}
    assert done | left == {site.name for site in graph.sites()}
    assert all(skip.asked for skip in result.report.skipped)
    report = qc.lower(result, "onnx", tmp_path / "onnx")
    assert report["parity"]["max_difference"] < 1e-5
    if graph.signature.has_cache:
        assert report["parity"]["cached_difference"] < 1e-5


def test_a_directory_of_experts_is_compiled_saved_loaded_and_lowered(tmp_path: Path) -> None:
    """As published: every matrix of every expert a tensor of its own, under other names than the model's."""
    model_of("mixtral").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    tokens = torch.randint(1, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(5))
    result = qc.compile(tmp_path / "model", [GPTQ(bits=4, group_size=16)], qc.Calibration.from_tokens(tokens))
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    report = qc.lower(loaded, "onnx", tmp_path / "onnx")
    assert report["parity"]["max_difference"] < 1e-5
    assert "model.layers.1.mlp.experts.down_proj.3" in {site.name for site in loaded.graph.sites()}


# --- what makes a family itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3", pytest.param("gpt_neo", marks=pytest.mark.slow)])
def test_windows_alternate(family: str) -> None:
    windows = [node.args[6] for node in calls(family, canonical.attention.default)]
    assert sorted(windows, key=str) == [WINDOW, None]


def test_logits_of_attention_are_capped() -> None:
    model: Any = model_of("gemma2")
    assert {node.args[7] for node in calls("gemma2", canonical.attention.default)} == {
        model.config.attn_logit_softcapping
    }
    assert {node.args[4] for node in calls("gemma2", canonical.attention.default)} == {16**-0.5}


def test_one_plus_the_weight_of_a_norm_is_a_tensor() -> None:
    graph = canonical_graph("gemma2")
    weights = {str(node.args[1].target) for node in calls("gemma2", canonical.rms_norm.default)}
    name = "model.layers.0.input_layernorm.weight"
    assert f"{name}.add" in weights
    torch.testing.assert_close(graph.weights.read(f"{name}.add"), 1 + dict(model_of("gemma2").named_parameters())[name])


@pytest.mark.parametrize("family", ["phi", "gpt_neox", pytest.param("gptj", marks=pytest.mark.slow)])
def test_a_part_of_each_head_is_rotated(family: str) -> None:
    assert {node.args[0].meta["shape"][-1] for node in calls(family, canonical.rotary.default)} == {4}
    assert {node.args[3] for node in calls(family, canonical.rotary.default)} == {family == "gptj"}


def test_no_calibration_row_for_an_expert(tmp_path: Path) -> None:
    graph = copy_graph(canonical_graph("mixtral"))
    result = qc.compile(graph, [GPTQ(bits=4, group_size=16)], qc.Calibration.from_tokens(torch.ones(1, 2).long()))
    experts = {site.site: site.details for site in result.report.sites if ".experts." in site.site}
    rows = {name: details["calibration_rows"] for name, details in experts.items()}
    assert 0 in rows.values()
    assert any(rows.values())
    for name, details in experts.items():
        assert ("fallback" in details) is (rows[name] == 0)


def test_experts_quantized_a_few_at_a_time_get_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(1, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(5))
    codes = []
    for limit in (1 << 28, 0):
        monkeypatch.setattr(segments, "_LARGEST_MOMENTS", limit)
        graph = copy_graph(canonical_graph("mixtral"))
        graph = qc.compile(graph, [GPTQ(bits=4, group_size=16)], qc.Calibration.from_tokens(tokens)).graph
        codes.append({name: graph.weights.read(name) for name in graph.weight_names() if name.endswith("_codes")})
    together, apart = codes
    assert len(together) == 24
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert torch.equal(value, apart[name]), name
