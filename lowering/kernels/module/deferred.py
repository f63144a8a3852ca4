"""A part of building: what stands in a module for weights that are made when they are wanted."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Deferred", "bytes_of"]


class Deferred(nn.Module):
    """Stands in the place of a module or a stored tensor; is never called.

    Args:
        make: reads weights and makes it.
        size: bytes of its tensors.
    """

    def __init__(self, make: Callable[[], nn.Module | Tensor], size: int) -> None:
        super().__init__()
        self.make, self.size = make, size


def bytes_of(member: nn.Module | Tensor) -> int:
    """Bytes of a tensor, or of all that a module holds."""
    tensors = [member] if isinstance(member, Tensor) else [*member.parameters(), *member.buffers()]
    return sum(tensor.nbytes for tensor in tensors)
