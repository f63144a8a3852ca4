"""Which caches are captured, by whatever names transformers gives them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.capture import _cache_ports, capture_module


def test_a_recurrent_state_is_refused():
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"a key-value cache|keys and values"):
        capture_module(MambaForCausalLM(config).eval())


def test_one_cache_of_two_names_is_a_cache():
    """Outputs of transformers 5.24 and later answer to the old names, and to both."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    ports = _cache_ports(SimpleNamespace(past_key_values=cache, cache_params=cache), "model")
    assert [port.name for port in ports] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert _cache_ports(SimpleNamespace(past_key_values=None, cache_params=None), "model") == ()
    with pytest.raises(UnsupportedModelError, match="recurrent"):
        _cache_ports(SimpleNamespace(past_key_values=cache, cache_params=object()), "model")
