"""Models without memory: built, copied, and bound to tensors by name."""

import json

import pytest
import torch
from torch import nn

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.skeleton import (
    _EmptyOnMeta,
    bind_checkpoint,
    build_on_meta,
    copy_for_tracing,
    tied_names,
)
from qcompiler.storage.weights import WeightStore
from tests.models import build


class Base(nn.Module):
    """A head on a base model that is called ``base``, with a tied pair, a buffer and a computed one."""

    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.base = nn.Module()
        self.base.LayerNorm = nn.LayerNorm(3)
        self.base.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.base.table.weight
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("made", torch.zeros(2), persistent=False)


@pytest.fixture
def model():
    return copy_for_tracing(Base(), "meta")


TENSORS = {
    "base.LayerNorm.weight": torch.randn(3),
    "base.LayerNorm.bias": torch.randn(3),
    "base.table.weight": torch.randn(5, 3),
    "kept": torch.randn(2),
}
MADE = {"made": torch.tensor([1.0, 2.0])}


def bound(model, tensors, computed=MADE):
    store = WeightStore.from_tensors(tensors)
    return bind_checkpoint(store, model, computed).weights


def check(store):
    assert sorted(store.names()) == sorted([*TENSORS, "head.weight", "made"])
    for name, tensor in TENSORS.items():
        assert torch.equal(store.read(name), tensor)
    assert store.tied("head.weight") == ("base.table.weight",)
    assert store.read("made").tolist() == [1.0, 2.0]


def test_names_as_they_are(model):
    check(bound(model, {**TENSORS, "unused": torch.zeros(1)}))


def test_names_without_the_prefix(model):
    check(bound(model, {name.removeprefix("base."): tensor for name, tensor in TENSORS.items()}))


def test_names_with_a_prefix_that_the_model_lacks():
    base = Base().base
    base.base_model_prefix = "base"
    tensors = {name: tensor for name, tensor in TENSORS.items() if name.startswith("base.")}
    store = bound(copy_for_tracing(base, "meta"), tensors, {})
    assert sorted(store.names()) == ["LayerNorm.bias", "LayerNorm.weight", "table.weight"]


def test_the_older_names_of_norms(model):
    tensors = dict(TENSORS)
    tensors["base.LayerNorm.gamma"], tensors["base.LayerNorm.beta"] = (
        tensors.pop("base.LayerNorm.weight"),
        tensors.pop("base.LayerNorm.bias"),
    )
    check(bound(model, tensors))


def test_a_tied_tensor_under_its_other_name(model):
    tensors = dict(TENSORS)
    tensors["head.weight"] = tensors.pop("base.table.weight")
    check(bound(model, tensors))


def test_tied_names_with_different_values_are_apart(model):
    other = TENSORS["base.table.weight"] + 1
    binding = bind_checkpoint(WeightStore.from_tensors({**TENSORS, "head.weight": other}), model, MADE)
    assert binding.untied == [("head.weight", "base.table.weight")]
    assert torch.equal(binding.weights.read("head.weight"), other)
    assert torch.equal(binding.weights.read("base.table.weight"), TENSORS["base.table.weight"])
    assert model.head.weight is not model.base.table.weight
    assert model.head.weight.is_meta


def test_tied_names_with_equal_values_are_one_tensor(model):
    store = WeightStore.from_tensors({**TENSORS, "head.weight": TENSORS["base.table.weight"].double()})
    binding = bind_checkpoint(store, model, MADE)
    assert binding.untied == []
    check(binding.weights)
    assert model.head.weight is model.base.table.weight


def test_three_names_of_which_one_is_apart(model):
    model.third = nn.Linear(3, 5, bias=False)
    model.third.weight = model.base.table.weight
    other = TENSORS["base.table.weight"] + 1
    binding = bind_checkpoint(WeightStore.from_tensors({**TENSORS, "third.weight": other}), model, MADE)
    assert binding.untied == [("third.weight", "base.table.weight")]
    assert binding.weights.tied("head.weight") == ("base.table.weight",)
    assert binding.weights.tied("third.weight") == ()


def test_a_module_of_two_names_has_one_tensor(model):
    """Transformers loads both into it, one after the other."""
    model.zz = model.base.LayerNorm
    last = TENSORS["base.LayerNorm.bias"] + 1
    binding = bind_checkpoint(WeightStore.from_tensors({**TENSORS, "zz.bias": last}), model, MADE)
    assert torch.equal(binding.weights.read("base.LayerNorm.bias"), last)
    assert binding.weights.tied("zz.bias") == ("base.LayerNorm.bias",)
    assert binding.untied == []


def test_what_belongs_nowhere_is_named(model):
    tensors = {**TENSORS, "base.mtp.weight": torch.zeros(1), "table.weight": torch.zeros(5, 3)}
    binding = bind_checkpoint(WeightStore.from_tensors(tensors), model, MADE)
    assert binding.unused == ["base.mtp.weight", "table.weight"]  # the second claims a name that is taken
    check(binding.weights)


def test_a_missing_parameter(model):
    tensors = {name: tensor for name, tensor in TENSORS.items() if "Norm" not in name}
    with pytest.raises(WeightError, match=r"2 missing: base\.LayerNorm\.weight, base\.LayerNorm\.bias"):
        bound(model, tensors)


def test_a_buffer_without_a_value(model):
    with pytest.raises(UnsupportedModelError, match="made"):
        bound(model, TENSORS, {})


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_shape(model, name):
    with pytest.raises(WeightError, match="shape"):
        bound(model, {**TENSORS, name: torch.zeros(4)})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_are_no_weights(model, dtype):
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        bound(model, {**TENSORS, "base.LayerNorm.weight": torch.zeros(3).to(dtype)})


def test_a_store_that_does_not_fit_is_left_as_it_was(model):
    store = WeightStore.from_tensors({**TENSORS, "kept": torch.zeros(9), "unused": torch.zeros(1)})
    with pytest.raises(WeightError):
        bind_checkpoint(store, model, MADE)
    assert sorted(store.names()) == sorted([*TENSORS, "unused"])


def test_built_on_meta(tmp_path):
    build("llama", layers=1).config.save_pretrained(tmp_path)
    model, computed = build_on_meta(tmp_path, {"architectures": ["LlamaForCausalLM"]}, trust_remote_code=False)
    assert not model.training
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert computed["model.rotary_emb.inv_freq"][0] == 1.0


def test_without_an_architecture_a_causal_language_model(tmp_path):
    build("gpt2", layers=1).config.save_pretrained(tmp_path)
    model, _ = build_on_meta(tmp_path, {}, trust_remote_code=False)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_copy_shares_what_it_can():
    model = Base().train()
    model.base.LayerNorm.half()
    copied = copy_for_tracing(model)
    assert (model.training, copied.training) == (True, False)
    assert copied.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert copied.head.weight is copied.base.table.weight
    assert (copied.base.LayerNorm.weight.dtype, model.base.LayerNorm.weight.dtype) == (torch.float32, torch.float16)
    assert not any(p.requires_grad for p in copied.parameters())


def test_tied_names():
    model = Base()
    model.alias = model.head
    both = ["base.table.weight", "head.weight"]
    names = tied_names(model)
    assert names["head.weight"] == names["base.table.weight"] == names["alias.weight"] == both
    assert names["base.LayerNorm.bias"] == ["base.LayerNorm.bias"]


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 1 << 40}, {"vocab_size": 1 << 40}, {"hidden_size": 1 << 34}])
def test_a_configuration_of_any_size_is_refused_while_it_is_built(tmp_path, sizes):
    config = build("llama", layers=1).config.to_dict() | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError) as caught:
        build_on_meta(tmp_path, config, trust_remote_code=False, stored_bytes=20_000)
    assert caught.value.where == str(tmp_path / "config.json")


def test_what_a_model_computes_as_it_is_built_is_limited_too():
    with pytest.raises(WeightError, match="no machine"), _EmptyOnMeta(20_000):
        torch.ones(1 << 15, 1 << 16)
    with _EmptyOnMeta(20_000):
        assert torch.ones(3).tolist() == [1, 1, 1]
