"""The ``config.json`` of a model in a GGUF file, from its settings. Source: ``gguf.constants`` 0.19."""

import math
from typing import Any

import torch
from torch import Tensor

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
        raise WeightError(
            "a GGUF file lacks a tensor", where=file.path, got=f"no {_EMBEDDING}", remedy="use the file as published"
        )
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
            "a GGUF file lacks a setting of its model",
            where=f"{file.path}: {key}",
            got=value,
            expected=kind.__name__,
            remedy="put the config.json of the original model beside the file, and name the directory",
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
    if kind == "yarn":
        return {**found, **_yarn(file)}
    if kind != "none":
        raise _scaling(file, kind)
    if LLAMA3_FACTORS in file.tensors:
        factors = file.read(LLAMA3_FACTORS).double()
        if not bool((factors == torch.ones_like(factors)).all()):
            told = _llama3(factors, base)
            if told is None:
                raise _scaling(file, f"{LLAMA3_FACTORS} (width {width})")
            return {**found, **told}
    return found


def _yarn(file: GGUFFile) -> dict[str, Any]:
    """YaRN: llama.cpp multiplies attention by ``1 + 0.1 ln factor``, and by a factor of the file."""
    factor = _setting(file, "rope.scaling.factor", float)
    attention = _setting(file, "rope.scaling.attn_factor", float, 1.0)
    attention *= _setting(file, "rope.scaling.yarn_attn_factor", float, 1.0)
    extrapolated = _setting(file, "rope.scaling.yarn_ext_factor", float, 1.0)
    if factor <= 1 or extrapolated != 1:
        raise _scaling(file, f"yarn, factor {factor}, yarn_ext_factor {extrapolated}")
    return {
        "rope_type": "yarn",
        "factor": _short(factor),
        "original_max_position_embeddings": _setting(file, "rope.scaling.original_context_length", int),
        "attention_factor": attention * (1 + 0.1 * math.log(factor)),
        "beta_fast": _setting(file, "rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": _setting(file, "rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _llama3(divisors: Tensor, base: float) -> dict[str, Any] | None:
    """The settings of Llama 3 under which frequencies are divided so.

    Those of long waves are divided by a factor, those of short ones stay, and between them ``1 / divisor`` grows with
    the frequency in a line: ``1 / factor + (1 - 1 / factor) (f length / 2 pi - low) / (high - low)``. Only two of the
    three numbers are told by a line; ``low_freq_factor`` is 1 in all models that are known.

    Args:
        divisors: float64 ``[channels of a head / 2]``.
        base: of the frequencies.

    Returns:
        The settings; None where none give these divisors.
    """
    width = 2 * len(divisors)
    turns = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width) / (2 * math.pi)
    factor = float(divisors.max())
    between = (divisors > 1) & (divisors < factor * (1 - 1e-6))
    if factor <= 1 or int(between.sum()) < 2:
        return None
    share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    first, last = (turns[between][end] for end in (0, -1))
    slope = float((share[0] - share[-1]) / (first - last))
    offset = float(slope * first - share[0])
    if slope <= 0 or offset <= 0:
        return None
    length, high = round(slope / offset), 1 + 1 / offset
    found = ((turns * length - 1) / (high - 1)).clamp(0, 1)
    expected = 1 / (found + (1 - found) / factor)
    if not torch.allclose(expected, divisors, rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(f"{high:.4g}"),
        "original_max_position_embeddings": length,
    }


def _scaling(file: GGUFFile, got: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        "rotary embeddings that are scaled in a way that is not read from GGUF",
        where=file.path,
        got=got,
        expected="none, linear, yarn, or those of Llama 3",
        remedy="put the config.json of the original model beside the file, and name the directory",
    )
