"""Token ids become values for every placeholder."""

import pytest
import torch
from torch import nn

from qcompiler.errors import InputError
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.feeding import empty_cache, feed, feed_tensors
from qcompiler.ir.signature import Port
from tests.models import POSITIONS, canonical_graph


def by_name(graph, values):
    assert list(values) == graph.inputs
    return dict(zip((port.name for port in graph.signature.inputs), values.values(), strict=True))


def test_prefill():
    graph = canonical_graph("llama")
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    values = by_name(graph, feed(graph, ids))
    assert values["input_ids"] is ids
    assert values["attention_mask"].tolist() == [[1] * 3] * 2
    assert values["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert all(values[f"past_key_values.{i}.{p}"].shape == (2, 2, 0, 8) for i in (0, 1) for p in ("key", "value"))


def test_decode():
    graph = canonical_graph("llama")
    past = [torch.randn(2, 2, 5, 8) for _ in range(4)]
    values = by_name(graph, feed(graph, torch.tensor([[7], [8]]), past))
    assert values["attention_mask"].shape == (2, 6)
    assert values["position_ids"].tolist() == [[5], [5]]
    assert values["past_key_values.1.key"] is past[2]


def test_token_types_are_zero():
    graph = canonical_graph("bert")
    values = by_name(graph, feed(graph, torch.tensor([[1, 2]])))
    assert values["token_type_ids"].tolist() == [[0, 0]]
    assert values["attention_mask"].tolist() == [[1, 1]]


def test_more_tokens_than_positions():
    graph = canonical_graph("bert")
    feed(graph, torch.zeros(1, POSITIONS, dtype=torch.int64))
    with pytest.raises(InputError, match="longer than the model allows"):
        feed(graph, torch.zeros(1, POSITIONS + 1, dtype=torch.int64))


def test_plain_inputs():
    graph = capture_module(nn.Linear(2, 2), (torch.randn(3, 2),))
    x = torch.randn(4, 2)
    assert feed_tensors(graph, [x]) == {graph.inputs[0]: x}
    with pytest.raises(InputError, match="does not match"):
        feed_tensors(graph, [x, x])
    with pytest.raises(InputError, match="no token ids"):
        feed(graph, torch.tensor([[1]]))


def test_an_empty_cache_has_the_dtype_of_its_port():
    port = Port("past_key_values.0.key", "past", "float8_e4m3fn", ("batch", 2, "past_sequence", 8), 0, "key")
    empty = empty_cache(port, 3, torch.device("cpu"))
    assert (empty.shape, empty.dtype) == ((3, 2, 0, 8), torch.float8_e4m3fn)
