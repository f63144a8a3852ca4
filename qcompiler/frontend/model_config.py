"""What a ``config.json`` says of the language model, wherever in it that stands."""

from collections.abc import Mapping
from typing import Any

__all__ = ["declared", "declared_positions"]

_PARTS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator")
"""Where models of more than text keep what belongs to their language model."""


def declared(config: Mapping[str, Any] | None, *names: str) -> Any:
    """The first of some fields that is there and not null.

    Args:
        config: of a ``config.json``. What its language model has in an object of its own comes first, since the fields
            beside that may be another part's.
        names: of the field, in order of preference.
    """
    if not isinstance(config, Mapping):
        return None
    nested = (declared(part, *names) for key in _PARTS if isinstance(part := config.get(key), Mapping))
    own = (config.get(name) for name in names)
    return next((value for values in (nested, own) for value in values if value is not None), None)


def declared_positions(config: Mapping[str, Any] | None) -> int | None:
    """The longest sequence of a model; None where its configuration sets no limit."""
    found = declared(config, "max_position_embeddings", "n_positions", "n_ctx")
    return found if isinstance(found, int) and found > 0 else None
