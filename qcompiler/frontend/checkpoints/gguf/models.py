"""Which models have a place in GGUF: the name of their architecture there, and those of their tensors.

Architectures that llama.cpp computes as transformers computes these models, of which a converter of its own writes the
same tensors. Sources: ``gguf.constants`` and ``gguf.tensor_mapping`` 0.19; llama.cpp, ``convert_hf_to_gguf.py``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = [
    "GGUF_MODELS",
    "GGUF_WORDS",
    "LLAMA3_FACTORS",
    "GGUFModel",
    "GGUFPlace",
    "gguf_places",
    "interleave",
    "undo_interleave",
]

LLAMA3_FACTORS = "rope_freqs.weight"
"""The tensor by which Llama 3 divides the frequencies of rotary embeddings."""

_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GGUFModel:
    """How a model is called in GGUF.

    Attributes:
        name: of the architecture.
        is_interleaved: rotary embeddings turn neighbouring channels of a head; transformers turns those that are half
            a head apart, and the rows of q and k are put in the other order.
        biases: the tensors that may have one.
    """

    name: str
    is_interleaved: bool
    biases: tuple[str, ...]


_ATTENTION = ("attn_q", "attn_k", "attn_v")
_LLAMA = GGUFModel("llama", True, (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
GGUF_MODELS: Mapping[str, GGUFModel] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GGUFModel("qwen2", False, _ATTENTION),
    "qwen3": GGUFModel("qwen3", False, ()),
}
"""By the ``model_type`` of ``config.json``; of those with one architecture, the first is what is read back."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("ByteLevel", "regex")
GGUF_WORDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (("Digits", "individual"), _GPT2),
    "llama-bpe": (("Split", _LLAMA3), ("ByteLevel", "")),
    "qwen2": (("Split", _LLAMA3.replace("{1,3}", "")), ("ByteLevel", "")),
}
"""How llama.cpp calls the ways to cut text into words, and the steps of ``pre_tokenizer`` that each consists of."""


@dataclass(frozen=True)
class GGUFPlace:
    """Where a tensor of a model lies.

    Attributes:
        name: in GGUF.
        heads: of q and k, whose rows are put in another order; None where they stay.
    """

    name: str
    heads: int | None


def gguf_places(names: Iterable[str], config: Any) -> dict[str, GGUFPlace | None]:
    """Where each tensor of a model lies; None for one that has no place.

    Args:
        names: of the tensors, as the model has them.
        config: of the model, as transformers makes it; its ``model_type`` is one of `GGUF_MODELS`.
    """
    import gguf

    model = GGUF_MODELS[config.model_type]
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model.name)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads: dict[object, int] = {
        gguf.MODEL_TENSOR.ATTN_Q: config.num_attention_heads,
        gguf.MODEL_TENSOR.ATTN_K: config.num_key_value_heads,
    }
    places: dict[str, GGUFPlace | None] = {}
    for name in names:
        found = known.get_type_and_name(name, try_suffixes=_SUFFIXES)
        if found is None or (found[1].endswith(".bias") and found[1].split(".")[-2] not in model.biases):
            places[name] = None
        else:
            places[name] = GGUFPlace(found[1], heads.get(found[0]) if model.is_interleaved else None)
    return places


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k so that channels turned together are neighbours: 0, n, 1, n + 1, ... of a head of 2n channels."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def undo_interleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `interleave`."""
    pairs = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
