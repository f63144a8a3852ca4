"""How the tensors of a model are divided into files."""

from collections.abc import Mapping

from qcompiler.storage.stored_tensor import (
    StoredTensor,
)

__all__ = ["DEFAULT_SHARD_BYTES", "partition"]

DEFAULT_SHARD_BYTES = 5_000_000_000


def partition(tensors: Mapping[str, StoredTensor], limit: int) -> list[dict[str, StoredTensor]]:
    """Cuts the sorted names into runs of at most ``limit`` bytes, a larger tensor alone; at least one run."""
    shards: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    return shards
