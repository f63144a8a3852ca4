"""Regions of model families to the last name, and the function kept when every one of them is scaled at random."""

import pytest
import torch
from torch import Tensor

from qcompiler.ir.graph import Graph
from qcompiler.proofs.fold_scales import fold_scale
from qcompiler.proofs.region import Region
from qcompiler.proofs.regions import find_regions
from tests.families import NAMED, VOCABULARY
from tests.models import canonical_graph, copy_graph, language_inputs, run, tolerance

LAYERS = (0, 1)
ROTARY = "rotary does not commute with a scale"
RMS_NORM = "rms_norm does not commute with a scale"
LAYER_NORM = "layer_norm does not commute with a scale"
SILU = "silu does not commute with a scale"
GELU = "gelu does not commute with a scale"
WRITTEN_GELU = "pow.Tensor_Scalar does not commute with a scale"
ATTENTION = "attention is not linear in its queries, keys and mask"
ADDED = "it is added to a value that does not take the scale"
RETURNED = "the graph returns it"

Found = dict[str, tuple[int, str, tuple[str, ...]]]
Refused = dict[str, str]


def shared(site: str) -> str:
    return f"{site}.weight is shared with another use"


def read_by_shared(site: str) -> str:
    return f"the weight of {site} is shared with another use"


def of_layers(prefix: str, found: Found, refused: Refused) -> tuple[Found, Refused]:
    """What one layer has, for both: ``#`` stands for its prefix."""
    every_found: Found = {}
    every_refused: Refused = {}
    for layer in LAYERS:
        place = prefix.format(layer)
        for producer, (size, consumers, notes) in found.items():
            every_found[place + producer] = size, ", ".join(place + name for name in consumers.split()), notes
        every_refused |= {place + name: reason for name, reason in refused.items()}
    return every_found, every_refused


_LLAMA: Found = {
    "input_layernorm": (32, "self_attn.q_proj self_attn.k_proj self_attn.v_proj", ()),
    "self_attn.v_proj": (16, "self_attn.o_proj", ()),
    "post_attention_layernorm": (32, "mlp.gate_proj mlp.up_proj", ()),
    "mlp.up_proj": (48, "mlp.down_proj", ()),
}
_LLAMA_REFUSED: Refused = {
    "self_attn.q_proj": ROTARY,
    "self_attn.k_proj": ROTARY,
    "self_attn.o_proj": ADDED,
    "mlp.gate_proj": SILU,
    "mlp.down_proj": ADDED,
}
_NORMED_HEADS: Refused = {
    "self_attn.q_proj": RMS_NORM,
    "self_attn.k_proj": RMS_NORM,
    "self_attn.q_norm": ROTARY,
    "self_attn.k_norm": ROTARY,
}
_GEMMA: Found = {
    "input_layernorm.weight.add": _LLAMA["input_layernorm"],
    "self_attn.v_proj": _LLAMA["self_attn.v_proj"],
    "pre_feedforward_layernorm.weight.add": _LLAMA["post_attention_layernorm"],
    "mlp.up_proj": _LLAMA["mlp.up_proj"],
}
_GEMMA_REFUSED: Refused = {
    "self_attn.q_proj": ROTARY,
    "self_attn.k_proj": ROTARY,
    "self_attn.o_proj": RMS_NORM,
    "post_attention_layernorm.weight.add": ADDED,
    "mlp.gate_proj": GELU,
    "mlp.down_proj": RMS_NORM,
    "post_feedforward_layernorm.weight.add": ADDED,
}
_HEAD: Found = {"model.norm": (32, "lm_head", ())}
_TIED: Refused = {"model.norm.weight.add": read_by_shared("lm_head"), "lm_head": shared("lm_head")}
_LAST = {"lm_head": RETURNED}
_MODEL = "model.layers.{}."


def _with(layers: tuple[Found, Refused], found: Found, refused: Refused) -> tuple[Found, Refused]:
    return {**layers[0], **found}, {**layers[1], **refused}


EXPECTED: dict[str, tuple[Found, Refused]] = {
    "llama": _with(of_layers(_MODEL, _LLAMA, _LLAMA_REFUSED), _HEAD, _LAST),
    "mistral": _with(of_layers(_MODEL, _LLAMA, _LLAMA_REFUSED), _HEAD, _LAST),
    "qwen2": _with(of_layers(_MODEL, _LLAMA, _LLAMA_REFUSED), _HEAD, _LAST),  # biases of q, k and v
    "qwen3": _with(of_layers(_MODEL, _LLAMA, {**_LLAMA_REFUSED, **_NORMED_HEADS}), _HEAD, _LAST),
    "gemma2": _with(of_layers(_MODEL, _GEMMA, _GEMMA_REFUSED), {}, _TIED),  # 1 + w; norms behind the blocks
    "gemma3": _with(
        of_layers(
            _MODEL,
            _GEMMA,
            _GEMMA_REFUSED
            | {"self_attn.q_proj": RMS_NORM, "self_attn.k_proj": RMS_NORM}
            | {"self_attn.q_norm.weight.add": ROTARY, "self_attn.k_norm.weight.add": ROTARY},
        ),
        {},
        _TIED,
    ),
    "phi": _with(  # attention and MLP read one norm
        of_layers(
            _MODEL,
            {
                "input_layernorm": (32, "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1", ()),
                "self_attn.v_proj": (32, "self_attn.dense", ()),
            },
            {
                "self_attn.q_proj": ROTARY,
                "self_attn.k_proj": ROTARY,
                "self_attn.dense": ADDED,
                "mlp.fc1": WRITTEN_GELU,
                "mlp.fc2": ADDED,
            },
        ),
        {"model.final_layernorm": (32, "lm_head", ())},
        _LAST,
    ),
    "phi3": _with(  # of fused matrices, the rows of values and of the factor beside the gate
        of_layers(
            _MODEL,
            {
                "input_layernorm": (32, "self_attn.qkv_proj", ()),
                "self_attn.qkv_proj": (16, "self_attn.o_proj", (ROTARY,)),
                "post_attention_layernorm": (32, "mlp.gate_up_proj", ()),
                "mlp.gate_up_proj": (48, "mlp.down_proj", (SILU,)),
            },
            {"self_attn.o_proj": ADDED, "mlp.down_proj": ADDED},
        ),
        _HEAD,
        _LAST,
    ),
    "gpt2": _with(
        of_layers(
            "transformer.h.{}.",
            {
                "ln_1": (32, "attn.c_attn", ()),
                "attn.c_attn": (32, "attn.c_proj", (ATTENTION,)),
                "ln_2": (32, "mlp.c_fc", ()),
            },
            {"attn.c_proj": ADDED, "mlp.c_fc": WRITTEN_GELU, "mlp.c_proj": ADDED},
        ),
        {},
        {"transformer.ln_f": read_by_shared("lm_head"), "lm_head": shared("lm_head")},
    ),
    "opt": _with(  # through ReLU, too
        of_layers(
            "model.decoder.layers.{}.",
            {
                "self_attn_layer_norm": (32, "self_attn.q_proj self_attn.k_proj self_attn.v_proj", ()),
                "self_attn.v_proj": (32, "self_attn.out_proj", ()),
                "final_layer_norm": (32, "fc1", ()),
                "fc1": (48, "fc2", ()),
            },
            {
                "self_attn.q_proj": ATTENTION,
                "self_attn.k_proj": ATTENTION,
                "self_attn.out_proj": ADDED,
                "fc2": ADDED,
            },
        ),
        {},
        {"model.decoder.final_layer_norm": read_by_shared("lm_head"), "lm_head": shared("lm_head")},
    ),
    "gpt_neox": _with(  # one residual sum for both blocks
        of_layers(
            "gpt_neox.layers.{}.",
            {
                "input_layernorm": (32, "attention.query_key_value", ()),
                "attention.query_key_value": (
                    32,
                    "attention.dense",
                    (ROTARY, "it is joined with other values"),
                ),
                "post_attention_layernorm": (32, "mlp.dense_h_to_4h", ()),
            },
            {"attention.dense": ADDED, "mlp.dense_h_to_4h": GELU, "mlp.dense_4h_to_h": ADDED},
        ),
        {"gpt_neox.final_layer_norm": (32, "lm_head", ())},
        _LAST,
    ),
    "mixtral": _with(
        of_layers(
            _MODEL,
            {name: _LLAMA[name] for name in ("input_layernorm", "self_attn.v_proj")},
            {name: reason for name, reason in _LLAMA_REFUSED.items() if name.startswith("self_attn.")},
        ),
        _HEAD,
        _LAST,
    ),
    "bert": _with(  # norms behind the blocks: their output is the residual stream
        of_layers(
            "bert.encoder.layer.{}.",
            {"attention.self.value": (32, "attention.output.dense", ())},
            {
                "attention.self.query": ATTENTION,
                "attention.self.key": ATTENTION,
                "attention.output.dense": LAYER_NORM,
                "attention.output.LayerNorm": LAYER_NORM,
                "intermediate.dense": GELU,
                "output.dense": LAYER_NORM,
            },
        ),
        {"bert.encoder.layer.1.output.LayerNorm": (32, "cls.predictions.transform.dense", ())},
        {
            "bert.embeddings.LayerNorm": LAYER_NORM,
            "bert.encoder.layer.0.output.LayerNorm": LAYER_NORM,
            "cls.predictions.transform.dense": GELU,
            "cls.predictions.transform.LayerNorm": read_by_shared("cls.predictions.decoder"),
            "cls.predictions.decoder": shared("cls.predictions.decoder"),
        },
    ),
}

every_family = pytest.mark.parametrize("family", NAMED)


def counted(family: str, name: str) -> bool:
    """All names but those of routed experts, which have tests of their own."""
    return family != "mixtral" or not any(part in name for part in (".mlp.", "post_attention_layernorm"))


@every_family
def test_regions_of_a_family(family: str) -> None:
    regions = find_regions(canonical_graph(family))
    found = {
        ", ".join(producer.name for producer in region.producers): (
            region.size,
            ", ".join(consumer.site.name for consumer in region.consumers),
            region.notes,
        )
        for region in regions.found
    }
    refused = {refusal.producer: refusal.reason.split(" at ")[0] for refusal in regions.refused}
    assert {name: value for name, value in found.items() if counted(family, name)} == EXPECTED[family][0]
    assert {name: reason for name, reason in refused.items() if counted(family, name)} == EXPECTED[family][1]


def test_regions_of_experts() -> None:
    """A channel has one scale in all experts; of the fused projection the rows behind the gate alone are free."""
    found = {region.producers[0].name: region for region in find_regions(canonical_graph("mixtral")).found}
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        experts = range(4)
        norm = found[f"model.layers.{layer}.post_attention_layernorm"]
        readers = [f"{mlp}.gate", *(f"{mlp}.experts.gate_up_proj.{e}" for e in experts)]
        assert [consumer.site.name for consumer in norm.consumers] == readers
        inner = found[f"{mlp}.experts.gate_up_proj.0"]
        assert [producer.name for producer in inner.producers] == readers[1:]
        assert [consumer.site.name for consumer in inner.consumers] == [f"{mlp}.experts.down_proj.{e}" for e in experts]
        assert inner.size == 48
        for producer in inner.producers:
            assert producer.channels.tolist() == [-1] * 48 + list(range(48))
        assert all(consumer.channels.tolist() == list(range(48)) for consumer in inner.consumers)


def scale_of(region: Region) -> Tensor:
    random = torch.Generator().manual_seed(region.size)
    return torch.exp2(4 * torch.rand(region.size, generator=random) - 2)


def outputs(graph: Graph) -> list[Tensor]:
    """Logits of a prefill with padding, then of decoding with the cache that it left."""
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    if not graph.signature.has_cache:
        return [run(graph, **language_inputs(graph, ids, mask))["logits"]]
    first = run(graph, **language_inputs(graph, ids[:, :5], mask[:, :5]))
    past = {name: value for name, value in first.items() if name.startswith("present")}
    return [first["logits"], run(graph, **language_inputs(graph, ids[:, 5:], mask, past))["logits"]]


def check_moved(before: Graph, after: Graph, region: Region, scale: Tensor) -> None:
    """Every producer took the inverse in its rows and bias, every consumer the scale in its columns, nobody else."""
    padded = torch.cat([scale, torch.ones(1)])
    for producer in region.producers:
        for name in filter(None, (producer.weight, producer.bias)):
            old = before.weights.read(name)
            by = padded[producer.channels].reshape([-1] + [1] * (old.dim() - 1))
            assert torch.equal(after.weights.read(name), old / by), name
            assert not torch.equal(after.weights.read(name), old), name
    for consumer in region.consumers:
        old = before.weights.read(consumer.site.weight)
        assert torch.equal(after.weights.read(consumer.site.weight), old * padded[consumer.channels])
        assert not torch.equal(after.weights.read(consumer.site.weight), old)
    touched = {name for p in region.producers for name in (p.weight, p.bias)}
    touched |= {consumer.site.weight for consumer in region.consumers}
    for name in set(before.weight_names()) - touched:
        assert after.weights.version(name) is not None
        assert torch.equal(after.weights.read(name), before.weights.read(name))


def check_alike(found: Tensor, expected: Tensor, what: str) -> None:
    assert float((found - expected).abs().max()) <= tolerance(expected), what


@every_family
def test_a_folded_scale_keeps_the_function(family: str) -> None:
    graph = canonical_graph(family)
    expected = outputs(graph)
    together = copy_graph(graph)
    regions = find_regions(graph).found
    for region in regions:
        folded = copy_graph(graph)
        scale = scale_of(region)
        fold_scale(folded, region, scale)
        check_moved(graph, folded, region, scale)
        for before, after in zip(expected, outputs(folded), strict=True):
            check_alike(after, before, region.name)
        fold_scale(together, region, scale)
    for before, after in zip(expected, outputs(together), strict=True):
        check_alike(after, before, "all together")


# --- channels ---------------------------------------------------------------------------------------------------------


def region_from(family: str, producer: str) -> Region:
    return next(r for r in find_regions(canonical_graph(family)).found if r.producers[0].name.endswith(producer))


def test_query_heads_that_share_a_key_head_share_its_scale() -> None:
    region = region_from("llama", "0.self_attn.v_proj")
    assert region.producers[0].channels.tolist() == list(range(16))
    assert region.consumers[0].channels.tolist() == [8 * (head // 2) + i for head in range(4) for i in range(8)]


def test_heads_of_their_own() -> None:
    region = region_from("opt", "0.self_attn.v_proj")
    assert region.producers[0].channels.tolist() == region.consumers[0].channels.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("family", "producer", "channels"),
    [
        ("phi3", "0.self_attn.qkv_proj", [-1] * 48 + list(range(16))),
        ("phi3", "0.mlp.gate_up_proj", [-1] * 48 + list(range(48))),
        ("gpt2", "0.attn.c_attn", [-1] * 64 + list(range(32))),
        (
            "gpt_neox",  # q, k and v of one head after the other
            "0.attention.query_key_value",
            [8 * head + i if i >= 0 else -1 for head in range(4) for i in (*[-1] * 16, *range(8))],
        ),
    ],
)
def test_rows_of_fused_matrices(family: str, producer: str, channels: list[int]) -> None:
    assert region_from(family, producer).producers[0].channels.tolist() == channels


ROWS, TABLE, SQUARE = (5, 8), (5, 4, 8), (5, 8, 8)
