"""The settings of a model, as key-value pairs of GGUF. Source: ``gguf.constants`` 0.19, and the GGUF specification."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompiler.errors import TargetError

if TYPE_CHECKING:
    import gguf

__all__ = ["add_settings", "context_length", "rope_factors"]

_ROPES = ("default", "linear", "llama3", "yarn")


def add_settings(writer: "gguf.GGUFWriter", config: Any) -> None:
    """Adds what llama.cpp has to know of a model.

    Args:
        writer: of the file.
        config: of the model, as transformers makes it.

    Raises:
        TargetError: for rotary embeddings that are not written.
    """
    import gguf

    rope = config.rope_parameters
    head = head_width(config)
    writer.add_context_length(context_length(config))
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _add_yarn(writer, config)


def _add_yarn(writer: "gguf.GGUFWriter", config: Any) -> None:
    """YaRN (arXiv 2309.00071), as llama.cpp computes it: its own factor of attention, ``1 + 0.1 ln factor``, times one
    that stands in the file.
    """
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    factor = float(rope["factor"])
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    writer.add_rope_scaling_attn_factors(float(attention) / (1 + 0.1 * math.log(factor)))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def check_settings(config: Any) -> None:
    """Refuses rotary embeddings that are not written.

    Raises:
        TargetError: naming them.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type")
    is_whole = rope.get("truncate", True) and (rope.get("factor") or 0) > 1 if kind == "yarn" else True
    if kind not in _ROPES or not is_whole:
        raise TargetError(
            "rotary embeddings of this kind are not written as GGUF",
            where="checkpoint: config.json: rope_parameters",
            got=kind if is_whole else f"{kind}, factor {rope.get('factor')}, truncate {rope.get('truncate', True)}",
            expected=f"{', '.join(_ROPES)}, which llama.cpp computes with a factor above 1 and truncate",
            remedy="write format=compressed-tensors",
        )


def head_width(config: Any) -> int:
    """Channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """The longest sequence: no longer than a sliding window, which llama.cpp does not know of these models."""
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    return longest if window is None else min(longest, int(window))


def rope_factors(config: Any) -> Tensor | None:
    """By how much the frequencies of rotary embeddings are divided; None where they are not.

    Llama 3 divides some of them: those are told as a tensor.

    Returns:
        float32 ``[channels of a head / 2]``.
    """
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    width = head_width(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    factors: Tensor = plain / divided
    return factors
