"""The ``config.json`` of a model in a GGUF file, from its settings. Source: ``gguf.constants`` 0.19."""

from typing import Any

import torch

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.checkpoints.gguf.models import GGUF_MODELS, LLAMA3_FACTORS
from qcompiler.storage import GGUFFile

__all__ = ["config_of"]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """What transformers builds the model from.

    Raises:
        UnsupportedModelError: for an architecture, or a scaling of rotary embeddings, that is not read.
        WeightError: for a file without a setting that every model has.
    """
    architecture = file.settings.get("general.architecture")
    model_type = next((key for key, value in GGUF_MODELS.items() if value.name == architecture), None)
    if model_type is None:
        raise UnsupportedModelError(
            "a GGUF file of an architecture that is not read",
            where=f"{file.path}: general.architecture",
            got=architecture,
            expected=", ".join(dict.fromkeys(model.name for model in GGUF_MODELS.values())),
            remedy="use the original model",
        )
    table = file.tensors.get(_EMBEDDING)
    if table is None or len(table.shape) != 2:
        raise WeightError("a GGUF file lacks a tensor", where=file.path, got=f"no {_EMBEDDING}")
    heads = _setting(file, "attention.head_count", int)
    hidden = _setting(file, "embedding_length", int)
    config: dict[str, Any] = {
        "architectures": [_class_of(model_type)],
        "model_type": model_type,
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _setting(file, "feed_forward_length", int),
        "num_hidden_layers": _setting(file, "block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": _setting(file, "attention.head_count_kv", int, heads),
        "head_dim": _setting(file, "attention.key_length", int, hidden // max(heads, 1)),
        "hidden_act": "silu",
        "max_position_embeddings": _setting(file, "context_length", int),
        "rms_norm_eps": _short(_setting(file, "attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": _rope(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": _HEAD not in file.tensors,
        "dtype": _DTYPES.get(table.kind, "float32"),
    }
    for name, key in _TOKENS.items():
        config[name] = file.settings.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _class_of(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: str = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return found


def _setting(file: GGUFFile, name: str, kind: type[Any], default: Any = None) -> Any:
    key = f"{file.settings['general.architecture']}.{name}"
    value = file.settings.get(key, default)
    if type(value) is not kind:
        raise WeightError(
            "a GGUF file lacks a setting of its model", where=f"{file.path}: {key}", got=value, expected=kind.__name__
        )
    return value


def _short(value: float) -> float:
    """A number that went through float32, without the digits that made."""
    return float(f"{value:.7g}")


def _rope(file: GGUFFile) -> dict[str, Any]:
    base = _short(_setting(file, "rope.freq_base", float, 10000.0))
    kind = _setting(file, "rope.scaling.type", str, "none")
    width = file.settings.get(f"{file.settings['general.architecture']}.rope.dimension_count")
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind == "linear":
        return {**found, "rope_type": "linear", "factor": _setting(file, "rope.scaling.factor", float)}
    if kind != "none":
        raise _scaling(file, kind)
    if LLAMA3_FACTORS in file.tensors:
        factors = file.read(LLAMA3_FACTORS).float()
        if not bool((factors == torch.ones_like(factors)).all()):
            raise _scaling(file, f"{LLAMA3_FACTORS} (width {width})")
    return found


def _scaling(file: GGUFFile, got: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        "rotary embeddings that are scaled in a way that is not read from GGUF",
        where=file.path,
        got=got,
        expected="none, or linear",
        remedy="put the config.json of the original model beside the file, and name the directory",
    )
