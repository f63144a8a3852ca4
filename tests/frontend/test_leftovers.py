"""What a checkpoint holds and a graph does not is summed up by where it lies."""

import torch
from torch import nn

from qcompiler.frontend.leftovers import unread_parameters, unused_tensors
from qcompiler.storage.weights import WeightStore


def store(*names: str) -> WeightStore:
    return WeightStore.from_tensors({name: torch.zeros(1 << 17) for name in names})


def said(model: nn.Module, unused: list[str], *used: str) -> str | None:
    return unused_tensors(unused, store(*unused, *used), model)


def test_grouped_by_the_first_part_that_nothing_used_shares() -> None:
    unused = [f"model.layers.{i}.{part}.weight" for i in (2, 3) for part in ("q", "k")] + ["tower.a", "tower.b", "x"]
    sentence = said(nn.Linear(1, 1), unused, "model.layers.0.q.weight", "model.norm.weight")
    assert sentence is not None
    assert sentence.startswith("7 stored tensors (3.5 MiB) belong to no parameter of Linear")
    assert sentence.endswith("model.layers.2 (2), model.layers.3 (2), tower (2), x")


def test_many_groups_are_counted() -> None:
    sentence = said(nn.Linear(1, 1), [f"m{i}.weight" for i in range(3000)], "used")
    assert sentence is not None
    assert sentence.endswith("m0.weight, m1.weight, m2.weight, m3.weight, m4.weight, m5.weight and 2994 more")
    assert len(sentence) < 250


def test_what_is_computed_anew_is_no_loss_but_weights_are() -> None:
    model = nn.Linear(1, 1)
    model._keys_to_ignore_on_load_unexpected = [r"attn\.bias", r"layers\.61"]  # type: ignore[assignment]
    assert said(model, ["h.0.attn.bias", "l.0.rotary_emb.inv_freq", "e.position_ids"], "h.0.mlp.w") is None
    sentence = said(model, ["layers.61.proj.weight", "layers.61.bias"], "layers.0.proj.weight")
    assert sentence is not None
    assert "2 stored tensors" in sentence
    assert said(model, [], "a") is None


def test_parameters_that_take_no_part() -> None:
    weights = store("pooler.weight", "pooler.bias", "encoder.0.weight")
    sentence = unread_parameters(["pooler.weight", "pooler.bias"], ["encoder.0.weight"], weights)
    assert sentence == (
        "2 parameters (1.0 MiB) take no part in what the model computes from tokens and are left out: pooler (2)"
    )
    assert unread_parameters([], ["encoder.0.weight"], weights) is None
