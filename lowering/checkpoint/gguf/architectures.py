"""What is refused of models that have no place in GGUF, or are computed otherwise there."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from qcompiler.errors import TargetError
from qcompiler.frontend import GGUF_MODELS, GGUFModel, GGUFPlace, gguf_places

__all__ = ["architecture_of", "check_names", "places_of"]


def architecture_of(config: Any) -> GGUFModel:
    """The architecture of a model.

    Args:
        config: of the model, as transformers makes it.

    Raises:
        TargetError: for a model that has no place in GGUF, or is not computed there as it is here.
    """
    found = GGUF_MODELS.get(config.model_type)
    if found is None:
        raise TargetError(
            "models of this type are not written as GGUF",
            where="checkpoint: config.json",
            got=config.model_type,
            expected=", ".join(GGUF_MODELS),
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


def places_of(names: Iterable[str], config: Any) -> dict[str, GGUFPlace]:
    """Where each tensor goes.

    Args:
        names: of the tensors, as the model has them.
        config: of the model, as transformers makes it.

    Raises:
        TargetError: for one that has no place.
    """
    architecture = architecture_of(config)
    places = {}
    for name, place in gguf_places(names, config).items():
        if place is None:
            raise TargetError(
                "GGUF has no place for a tensor of this model",
                where=f"checkpoint: {name}",
                got=config.model_type,
                expected=f"a tensor of the architecture {architecture.name}",
                remedy="write format=compressed-tensors",
            )
        places[name] = place
    return places


def check_names(model: nn.Module) -> None:
    """Refuses a model with a tensor that has no place in GGUF.

    Raises:
        TargetError: that names it.
    """
    places_of(dict(model.named_parameters()), model.config)
