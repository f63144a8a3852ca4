"""Holds a pass to what it declares of itself: that ``modified`` is true, that an exact pass keeps what is computed.

`state_of` is taken before and after a pass, for `check_declared`; what a probe gives before and after, for
`check_exact`. `qcompiler.sweep` does both in every compilation.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from qcompiler.errors import VerificationError
from qcompiler.ir import Graph
from qcompiler.protocol.pass_base import Effect, Pass, PassResult

__all__ = ["check_declared", "check_exact", "state_of"]

_EXACT_ROUNDINGS = 64
"""Roundings of float32 that an exact rewrite may add up to, per square root of the width of what is summed."""


def state_of(graph: Graph, nodes: Iterable[fx.Node]) -> dict[str, object]:
    """What tells whether nodes, or the tensors they read, were changed: equal before and after if they were not."""
    state: dict[str, object] = {}
    for node in nodes:
        state[node.name] = (str(node.target), str(node.args), str(node.kwargs))
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                state[str(source.target)] = graph.weights.version(str(source.target))
    return state


def check_declared(
    item: Pass, result: PassResult, before: Mapping[str, object], after: Mapping[str, object], where: str
) -> None:
    """Holds a pass to what it says of itself: ``modified``, and that an analysis changes nothing.

    Raises:
        VerificationError: naming what was changed, or not.
    """
    changed = sorted(key for key in {*before, *after} if before.get(key) != after.get(key))
    if bool(changed) is not result.modified:
        raise VerificationError(
            "a pass does not say truly whether it changed something",
            where=where,
            got=f"modified={result.modified}, changed: {', '.join(changed[:4]) or 'nothing'}",
            expected=f"modified={bool(changed)}",
            remedy="return PassResult(modified=...) as it is",
        )
    if changed and item.effect is Effect.ANALYSIS:
        raise VerificationError(
            "a pass that is declared an analysis changed the graph", where=where, got=", ".join(changed[:4])
        )


def check_exact(expected: Sequence[Tensor], actual: Sequence[Tensor], width: int, where: str) -> None:
    """Compares what a piece of the graph computed before and after an exact rewrite.

    The largest difference, relative to the largest value, may be ``64 eps sqrt(width)``: a factor moved from one
    operand to another changes the rounding of every product, and sums of ``width`` products gather it like a random
    walk.

    Args:
        expected: values before, float.
        actual: the same values after.
        width: the largest number of terms in a sum.
        where: for the message.

    Raises:
        VerificationError: if they differ by more.
    """
    tolerance = _EXACT_ROUNDINGS * torch.finfo(torch.float32).eps * width**0.5
    for before, after in zip(*([value.double() for value in values] for values in (expected, actual)), strict=True):
        if before.shape == after.shape and not before.numel():
            continue
        largest = before.abs().max().item() or 1.0
        difference = (before - after).abs().max().item() / largest if before.shape == after.shape else float("inf")
        if not difference <= tolerance:  # a NaN is not
            raise VerificationError(
                "a pass that is declared exact changed what the model computes",
                where=where,
                got=f"a relative difference of {difference:.2e}",
                expected=f"at most {tolerance:.1e}",
                remedy="declare it APPROXIMATE, or mend it",
            )
