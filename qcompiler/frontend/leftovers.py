"""What a checkpoint holds and a captured graph does not: found by names alone, and said in one sentence each."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from qcompiler.storage import WeightStore

__all__ = ["unread_parameters", "unused_tensors"]

_SHOWN = 6
_RECOMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # transformers computes them anew


def unused_tensors(unused: Sequence[str], store: WeightStore, model: nn.Module) -> str | None:
    """Says which stored tensors have no place in a model: heads that predict several tokens, layers that
    ``config.json`` does not count.

    Args:
        unused: their stored names.
        store: of the checkpoint.
        model: its own word counts on what is computed anew, such as frequencies and masks; that is no loss.

    Returns:
        One sentence, or None where nothing is lost.
    """
    patterns = [*_RECOMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    lost = set(unused)
    groups = {
        prefix: names
        for prefix, names in _by_prefix(unused, (name for name in store.names() if name not in lost)).items()
        if any(name.endswith(".weight") or not _matches(name, patterns) for name in names)
    }
    if not groups:
        return None
    names = [name for group in groups.values() for name in group]
    return (
        f"{len(names)} stored tensors ({_mib(store, names)}) belong to no parameter of {type(model).__name__} and are "
        f"left out, as transformers leaves them out: {_listed(groups)}"
    )


def unread_parameters(unread: Sequence[str], read: Iterable[str], weights: WeightStore) -> str | None:
    """Says which parameters of a model take no part in what the graph computes: a vision tower, a pooler.

    Args:
        unread: their names.
        read: the names of those that do.
        weights: of the model.
    """
    if not unread:
        return None
    return (
        f"{len(unread)} parameters ({_mib(weights, unread)}) take no part in what the model computes from tokens and "
        f"are left out: {_listed(_by_prefix(unread, read))}"
    )


def _by_prefix(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Names by the shortest prefix of whole components that none of the others has."""
    prefixes = {prefix for other in others for prefix in _prefixes(other)}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(next((p for p in _prefixes(name) if p not in prefixes), name), []).append(name)
    return groups


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _listed(groups: dict[str, list[str]]) -> str:
    shown = [names[0] if len(names) == 1 else f"{prefix} ({len(names)})" for prefix, names in groups.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _mib(store: WeightStore, names: Iterable[str]) -> str:
    return f"{store.stored_bytes(names) / (1 << 20):.1f} MiB"
