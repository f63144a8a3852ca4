"""Which models have a place in GGUF: the name of their architecture there, and those of their tensors.

Architectures that llama.cpp computes as transformers computes these models, of which a converter of its own writes the
same tensors. Sources: ``gguf.constants`` and ``gguf.tensor_mapping`` 0.19; llama.cpp, ``convert_hf_to_gguf.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qcompiler.errors import TargetError

__all__ = ["Architecture", "Place", "architecture_of", "interleave", "places_of"]

_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Architecture:
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
_LLAMA = Architecture("llama", True, (*_ATTENTION, "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", False, _ATTENTION),
    "qwen3": Architecture("qwen3", False, ()),
}
"""By the ``model_type`` of ``config.json``."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model goes.

    Attributes:
        name: in GGUF.
        heads: of q and k, whose rows are put in another order; None where they stay.
    """

    name: str
    heads: int | None


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model.

    Args:
        config: of the model, as transformers makes it.

    Raises:
        TargetError: for a model that has no place in GGUF, or is not computed there as it is here.
    """
    found = _ARCHITECTURES.get(config.model_type)
    if found is None:
        raise TargetError(
            "models of this type are not written as GGUF",
            where="checkpoint: config.json",
            got=config.model_type,
            expected=", ".join(_ARCHITECTURES),
            remedy="write format=compressed-tensors",
        )
    if config.hidden_act not in ("silu", "swish"):
        raise _unknown("hidden_act", config.hidden_act, "silu, as llama.cpp has it there")
    if getattr(config, "partial_rotary_factor", None) not in (None, 1, 1.0):
        raise _unknown("partial_rotary_factor", config.partial_rotary_factor, "rotary embeddings of whole heads")
    return found


def _unknown(field: str, got: object, expected: str) -> TargetError:
    return TargetError(
        "llama.cpp computes something else than this model",
        where=f"checkpoint: config.json: {field}",
        got=got,
        expected=expected,
        remedy="write format=compressed-tensors",
    )


def places_of(names: Iterable[str], config: Any) -> dict[str, Place]:
    """Where each tensor goes.

    Args:
        names: of the tensors, as the model has them.
        config: of the model, as transformers makes it.

    Raises:
        TargetError: for one that has no place.
    """
    import gguf

    architecture = architecture_of(config)
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {
        gguf.MODEL_TENSOR.ATTN_Q: config.num_attention_heads,
        gguf.MODEL_TENSOR.ATTN_K: config.num_key_value_heads,
    }
    places = {}
    for name in names:
        found = known.get_type_and_name(name, try_suffixes=_SUFFIXES)
        is_bias = found is not None and found[1].endswith(".bias")
        if found is None or (is_bias and found[1].split(".")[-2] not in architecture.biases):
            raise TargetError(
                "GGUF has no place for a tensor of this model",
                where=f"checkpoint: {name}",
                got=config.model_type,
                expected=f"a tensor of the architecture {architecture.name}",
                remedy="write format=compressed-tensors",
            )
        kind, place = found
        places[name] = Place(place, heads.get(kind) if architecture.is_interleaved else None)
    return places


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k so that channels turned together are neighbours: 0, n, 1, n + 1, ... of a head of 2n channels."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def check_names(model: nn.Module) -> None:
    """Refuses a model with a tensor that has no place in GGUF.

    Raises:
        TargetError: that names it.
    """
    places_of(dict(model.named_parameters()), model.config)
