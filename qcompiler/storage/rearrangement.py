"""How a tensor of a store is put together from others, where that moves their numbers and no more."""

from collections.abc import Callable, Collection

from torch import Tensor

from qcompiler.storage.stored_tensor import Rearranged, StoredTensor

__all__ = ["rearrangement"]


def rearrangement(
    version: object, versions: Collection[object]
) -> tuple[tuple[object, ...], Callable[..., Tensor]] | None:
    """The tensors that another is a rearrangement of, and how it is made of them. Nothing is read.

    Args:
        version: what `WeightStore.version` gave of a tensor.
        versions: the same of tensors to go back to.

    Returns:
        Of these, the ones it is made of, and the function of them; None where it is made of something else.
    """
    if version in versions:
        return (version,), lambda tensor: tensor
    source = version.source if isinstance(version, StoredTensor) else None
    if not isinstance(source, Rearranged):
        return None
    parts = [rearrangement(item, versions) for item in source.sources]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    combine = source.function

    def function(*tensors: Tensor) -> Tensor:
        rest, arguments = list(tensors), []
        for origins, inner in found:
            given, rest = rest[: len(origins)], rest[len(origins) :]
            arguments.append(inner(*given))
        return combine(*arguments)

    return tuple(origin for origins, _ in found for origin in origins), function
