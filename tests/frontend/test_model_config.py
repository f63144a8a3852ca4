"""Fields of a config.json, nested or not."""

import pytest

from qcompiler.frontend.model_config import declared, declared_positions


@pytest.mark.parametrize("part", ["text_config", "llm_config", "thinker_config"])
def test_the_language_models_own_part_comes_first(part):
    nested = {"vocab_size": 5, "vision_config": {"vocab_size": 1}, part: {"vocab_size": 7}}
    assert declared(nested, "vocab_size") == 7
    assert declared({"a": nested, part: {"text_config": {"vocab_size": 9}}}, "vocab_size") == 9
    assert declared({"vocab_size": 5, part: {"vocab_size": None}}, "vocab_size") == 5
    assert declared_positions({part: {"n_positions": 40}}) == 40


def test_what_is_absent():
    for config in (None, {}, {"text_config": "none"}, {"vision_config": {"vocab_size": 3}}, []):
        assert declared(config, "vocab_size") is None
        assert declared_positions(config) is None
    for value in (None, 0, "many"):
        assert declared_positions({"max_position_embeddings": value}) is None


def test_names_in_order():
    assert declared({"n_ctx": 3, "n_positions": 4}, "n_positions", "n_ctx") == 4
