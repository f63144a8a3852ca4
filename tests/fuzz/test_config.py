"""A ``config.json`` of any content."""

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.odd_values import bounded, damaged_texts, edited, few_or_many
from tests.fuzz.surroundings import Surroundings, surroundings
from tests.tiny_checkpoint import Outcome

_SIZES = [0, -1, 1, 31, 33, 1 << 33, 1 << 62, 1 << 64, 0.5]
_OTHERS: dict[str, list[Any]] = {
    "model_type": ["llama", "gpt2", "bert", "t5", "mixtral", "qwen3_moe", "llava", "mamba", "gemma3", "no-such-model"],
    "architectures": [[], ["LlamaForCausalLM"], ["LlamaModel"], ["GPT2LMHeadModel"], ["AutoConfig"], ["pipeline"], [3]],
    "num_hidden_layers": [0, 2, 100, 10**9, 1 << 70],
    "hidden_size": _SIZES,
    "intermediate_size": _SIZES,
    "vocab_size": _SIZES,
    "head_dim": [*_SIZES, 7],
    "num_attention_heads": [*_SIZES, 3, 8],
    "num_key_value_heads": [*_SIZES, 3, 4],
    "max_position_embeddings": [0, -1, 1, 10**18],
    "rope_parameters": [{}, {"rope_type": "no-such"}, {"rope_type": "yarn"}, {"rope_theta": 0, "rope_type": "default"}],
    "rope_scaling": [
        {"type": "linear", "factor": 0},
        {"rope_type": "longrope"},
        {"rope_type": "dynamic", "factor": -1},
    ],
    "quantization_config": [{}, {"quant_method": "gptq"}, {"quant_method": []}, {"load_in_4bit": True}, []],
    "text_config": [{}, {"model_type": "llama"}, {"vocab_size": 5}, {"num_hidden_layers": 10**9}],
    "layer_types": [[], ["sliding_attention"], ["no-such"], ["full_attention"] * 100],
    "sliding_window": [0, -5, 1, 1 << 60],
    "hidden_act": ["relu", "no-such"],
    "dtype": ["float32", "float64", "int8", "no-such"],
    "tie_word_embeddings": [True],
    "is_encoder_decoder": [True],
    "auto_map": [{"AutoConfig": "missing.Config", "AutoModelForCausalLM": "missing.Model"}, {"AutoConfig": 3}],
    "rms_norm_eps": [0, -1, float("nan"), 1e30],
    "eos_token_id": [-1, 1 << 40, [], [[1]], "x"],
    "use_cache": [False],
    "attn_implementation": ["no-such", "flash_attention_2"],
    "output_attentions": [True],
    "transformers_weights": ["../x"],
}


def _use(place: Surroundings, purpose: str) -> Outcome:
    """Runs the command that reads the configuration for some purpose."""
    if purpose == "compile":
        return place.compile()
    if purpose == "inspect":
        return place.run("inspect", place.model)
    if purpose == "evaluate":
        return place.run("evaluate", place.model, "--text", place.text, "--max-tokens", 40, "--json")
    return place.run("generate", place.model, "--prompt", "the sea", "--max-new-tokens", 2, "--json")


_purposes = st.sampled_from(["compile", "inspect", "evaluate", "generate"])


@few_or_many(60, 600)
def test_edited(original: Path, examples: int) -> None:
    fields = json.loads((original / "model" / "config.json").read_text())

    @bounded(examples)
    @given(edited(fields, _OTHERS), _purposes)
    def check(config: dict[str, Any], purpose: str) -> None:
        with surroundings(original) as place:
            (place.model / "config.json").write_text(json.dumps(config))
            _use(place, purpose)

    check()


@few_or_many(15)
def test_damaged(original: Path, examples: int) -> None:
    fields = json.loads((original / "model" / "config.json").read_text())

    @bounded(examples)
    @given(damaged_texts(fields), _purposes)
    def check(text: bytes, purpose: str) -> None:
        with surroundings(original) as place:
            (place.model / "config.json").write_bytes(text)
            _use(place, purpose)

    check()
