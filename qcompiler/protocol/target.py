"""What a target makes of a graph and its quantization schemes, asked ahead of calibration, not found out behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat, Graph
from qcompiler.numerics import Scheme

__all__ = ["Support", "SupportStatus", "TargetSpec", "check_caches", "check_schemes"]

SupportStatus = Literal["fused", "runs", "writes-only", "refused"]


@dataclass(frozen=True)
class Support:
    """How far a target goes with a scheme.

    Attributes:
        status: ``fused``: a kernel made for it; ``runs``: right, but dequantized on the way; ``writes-only``: the file
            is valid, nothing here runs it; ``refused``: not written.
        reason: why, wherever there is something to say; never empty when refused.
        remedy: what would be taken instead, where it is refused and there is such a thing.
    """

    status: SupportStatus
    reason: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status == "refused" and not self.reason:
            raise ValueError("a refusal needs a reason")


class TargetSpec(Protocol):
    """A place quantized models are lowered to."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer with ``width`` input channels under ``scheme``."""
        ...

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache of this format."""
        ...

    def check_graph(self, graph: Graph) -> None:
        """Refuses, ahead of everything long, what it will not take of a graph that no pass has rewritten yet.

        Raises:
            TargetError: that names operator and node.
            MissingDependencyError: without a package that lowering needs.
        """
        ...


def check_schemes(
    schemes: Mapping[str, Scheme], widths: Mapping[str, int], targets: Sequence[TargetSpec]
) -> dict[str, dict[str, Support]]:
    """Asks every target about every site.

    Args:
        schemes: by site.
        widths: input channels by site.
        targets: all of them must take every site.

    Returns:
        Per target name, per site, what becomes of it.

    Raises:
        TargetError: if a target refuses a site.
    """
    found: dict[str, dict[str, Support]] = {}
    for target in targets:
        answers = found.setdefault(target.name, {})
        for site, scheme in schemes.items():
            answers[site] = support = target.supports(scheme, widths[site])
            if support.status == "refused":
                raise TargetError(
                    "the target does not take this scheme",
                    where=f"{target.name}: {site}",
                    got=scheme,
                    expected=support.reason,
                    remedy=f"{support.remedy}, or leave this target out" if support.remedy else "leave this target out",
                )
    return found


def check_caches(formats: Sequence[CacheFormat], targets: Sequence[TargetSpec]) -> dict[str, dict[str, Support]]:
    """Asks every target about every format that caches are given.

    Returns:
        Per target name, per format as text, what becomes of it.

    Raises:
        TargetError: if a target refuses one.
    """
    found: dict[str, dict[str, Support]] = {}
    for target in targets:
        answers = found.setdefault(target.name, {})
        for spec in formats:
            answers[str(spec)] = support = target.supports_cache(spec)
            if support.status == "refused":
                raise TargetError(
                    "the target does not take a cache of this format",
                    where=target.name,
                    got=spec,
                    expected=support.reason,
                    remedy=f"{support.remedy}, or leave this target out" if support.remedy else "leave this target out",
                )
    return found
