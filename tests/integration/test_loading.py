"""What is captured from a directory is what transformers loads: names, shapes, ties and values, by its own report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.errors import WeightError
from qcompiler.frontend.capture import capture_directory
from qcompiler.frontend.skeleton import Binding, bind_checkpoint, build_on_meta
from qcompiler.storage.weights import WeightStore
from tests.families import SPECS
from tests.models import build

Tensors = dict[str, Tensor]


def model_of(family: str, **options: Any) -> Any:
    """A model of a family, which can save itself."""
    return build(family, **options)


def bound(directory: Path) -> Binding:
    model, computed = build_on_meta(directory, json.loads((directory / "config.json").read_text()), False)
    return bind_checkpoint(WeightStore.from_directory(directory), model, computed)


def check_against_transformers(directory: Path) -> tuple[Binding, dict[str, Any]]:
    """Compares every tensor, which of them are one, and which stored names lead nowhere."""
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    ours = bound(directory)
    assert not info["missing_keys"]
    state = model.state_dict(keep_vars=True)
    assert state.keys() <= set(ours.weights.names())
    for name, value in state.items():
        assert torch.equal(ours.weights.read(name).float(), value.detach().float()), name
    theirs = {name: {other for other in state if state[other] is state[name]} for name in state}
    assert {name: {name, *ours.weights.tied(name)} for name in state} == theirs
    assert len(ours.unused) >= len(info["unexpected_keys"])  # transformers has words for some of them, and hides those
    assert bool(ours.unused) is bool(info["unexpected_keys"])
    return ours, info


@pytest.mark.parametrize("family", SPECS)
def test_every_family(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    ours, _ = check_against_transformers(tmp_path)
    assert ours.unused == []
    assert ours.untied == []


# --- mishaps ----------------------------------------------------------------------------------------------------------


def another(name: str, of: str | None = None) -> Callable[[Tensors], None]:
    """Stores a tensor under a further name: of other values, or the same with ``of``."""

    def change(tensors: Tensors) -> None:
        like = tensors[of] if of is not None else next(t for t in tensors.values() if t.dim() == 2 and len(t) == 61)
        tensors[name] = like.clone() if of is not None else like + 1

    return change


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        before = dict(tensors)
        tensors.clear()
        tensors.update({rename(name): value for name, value in before.items()})
        assert tensors.keys() != before.keys()

    return change


def another_bias(tensors: Tensors) -> None:
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1


def extra_heads(tensors: Tensors) -> None:
    for name in ("model.mtp.0.proj.weight", "model.mtp.0.norm.weight", "model.mtp.1.norm.weight"):
        tensors[name] = torch.ones(3)


def negative_zeros(tensors: Tensors) -> None:
    embedding = tensors["model.embed_tokens.weight"]
    embedding[0] = 0
    tensors["lm_head.weight"] = torch.where(embedding == 0, -0.0, embedding)


TIED = {"tie_word_embeddings": True}
MISHAPS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors], None] | None, dict[str, Any]]] = {
    # family, options it is saved with, what is done to its tensors, what is then written into config.json
    "another head": ("llama", TIED, another("lm_head.weight"), {}),
    "another head, untied in the file only": ("llama", {}, None, TIED),
    "the same head": ("llama", TIED, another("lm_head.weight", "model.embed_tokens.weight"), {}),
    "a head of negative zeros": ("llama", TIED, negative_zeros, {}),
    "the head alone": (
        "gemma2",
        {},
        renamed(lambda name: name.replace("model.embed_tokens", "lm_head")),
        {},
    ),
    "another head of gpt2": ("gpt2", {}, another("lm_head.weight"), {}),
    "another bias of bert": ("bert", {}, another_bias, {}),
    "another matrix of bert": ("bert", {}, another("cls.predictions.decoder.weight"), {}),
    "fewer layers": ("llama", {}, None, {"num_hidden_layers": 1}),
    "fewer layers of experts": ("mixtral", {}, None, {"num_hidden_layers": 1}),
    "heads that predict more tokens": ("llama", {}, extra_heads, {}),
    "no prefix": ("gpt2", {}, renamed(lambda name: name.removeprefix("transformer.")), {}),
    "older spellings": (
        "bert",
        {},
        renamed(lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")),
        {},
    ),
    "old frequencies": ("llama", {}, another("model.layers.0.self_attn.rotary_emb.inv_freq"), {}),
}


def mishap(name: str, directory: Path) -> Path:
    family, options, change, fields = MISHAPS[name]
    model_of(family, **options).save_pretrained(directory)
    file, config = directory / "model.safetensors", directory / "config.json"
    if change is not None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    return directory


@pytest.mark.parametrize("name", [name for name in MISHAPS if name != "old frequencies"])
def test_mishaps(name: str, tmp_path: Path) -> None:
    ours, _ = check_against_transformers(mishap(name, tmp_path))
    assert bool(ours.untied) is name.startswith("another")
    assert bool(ours.unused) is name.startswith(("fewer", "heads"))


def test_a_head_of_its_own_is_kept_and_said(tmp_path: Path) -> None:
    graph = qc.capture(mishap("another head", tmp_path))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    (note,) = graph.notes
    assert "lm_head.weight and model.embed_tokens.weight" in note
    assert graph.lost == []
    ids = torch.arange(12).reshape(2, 6)
    result = qc.compile(graph, [])
    with torch.no_grad():
        torch.testing.assert_close(result.artifact().forward(ids), model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
    assert note in result.report.notes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fewer layers", "9 stored tensors (0.0 MiB) belong to no parameter of LlamaForCausalLM and are left out, as "
         "transformers leaves them out: model.layers.1 (9)"),
        ("heads that predict more tokens", "model.mtp (3)"),
        ("old frequencies", None),
    ],
)  # fmt: skip
def test_what_has_no_place_is_lost_and_said(name: str, said: str | None, tmp_path: Path) -> None:
    lost = capture_directory(mishap(name, tmp_path)).lost
    if said is None:
        assert lost == []
    else:
        (sentence,) = lost
        assert said in sentence


def test_a_head_that_nothing_gives(tmp_path: Path) -> None:
    """Transformers would make one up."""
    model_of("llama", layers=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(WeightError, match="lm_head"):
        capture_directory(tmp_path)


def test_a_head_that_the_index_does_not_name(tmp_path: Path) -> None:
    model_of("llama", layers=1).save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    shard = fields["weight_map"].pop("lm_head.weight")
    fields["weight_map"]["model.norm.weight"] = shard
    tensors = {**load_file(tmp_path / shard), "model.norm.weight": torch.ones(32)}
    save_file(tensors, tmp_path / shard, metadata={"format": "pt"})
    index.write_text(json.dumps(fields))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **TIED}))
    ours, _ = check_against_transformers(tmp_path)
    assert ours.untied == [("lm_head.weight", "model.embed_tokens.weight")]


def test_a_vision_tower_is_left_out_and_said(tmp_path: Path) -> None:
    torch.manual_seed(7)
    text = {**SPECS["llama"][2], "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "image_size": 16}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config={**text, **counts}, vision_config={**vision, **counts, "patch_size": 8}, image_token_index=60
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    graph = qc.capture(tmp_path)
    (sentence,) = graph.lost
    assert "model.vision_tower" in sentence
    assert "model.multi_modal_projector (4)" in sentence
    read = set(graph.weight_names())
    taking_part = sum(p.numel() for name, p in model.named_parameters() if name in read)
    assert graph.provenance["parameters"] == taking_part < sum(p.numel() for p in model.parameters()) / 1.5
    ids = torch.arange(12).reshape(2, 6)
    logits = qc.compile(graph, []).artifact().forward(ids)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-4)
