"""Whether what a model keeps of keys and values can lie in one place, written to as it grows."""

from collections.abc import Iterable

import onnx
import onnx_ir as ir

__all__ = ["shares_caches", "shares_caches_of_file"]

_PAST, _OPERATOR = "past_key_values.", "GroupQueryAttention"


def shares_caches(model: ir.Model) -> bool:
    """Whether GroupQueryAttention alone reads the caches that enter, so that nothing asks how long they are."""
    reads = ((node.op_type, [value.name for value in node.inputs if value is not None]) for node in model.graph)
    return _shares(reads, [value.name or "" for value in model.graph.inputs])


def shares_caches_of_file(model: onnx.ModelProto) -> bool:
    """As `shares_caches`."""
    reads = ((node.op_type, list(node.input)) for node in model.graph.node)
    return _shares(reads, [port.name for port in model.graph.input])


def _shares(reads: Iterable[tuple[str, Iterable[str | None]]], inputs: Iterable[str]) -> bool:
    pasts = {name for name in inputs if name.startswith(_PAST)}
    found = [kind for kind, names in reads if pasts.intersection(name for name in names if name)]
    return bool(found) and set(found) == {_OPERATOR}
