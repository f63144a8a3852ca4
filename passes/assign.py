"""`Assign`: decides what is quantized where; every later pass reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from qcompiler.errors import RecipeError, did_you_mean
from qcompiler.ir import Graph, Site, ancestors, routers
from qcompiler.numerics import Scheme
from qcompiler.protocol import (
    CANONICAL,
    SCHEMES,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Skip,
    Target,
    WeightQuantizer,
)

__all__ = ["Assign", "ShorthandQuantizer"]

_RESULTS = ("logits", "scores")
_GROUPS = (64, 32, 16)  # in the place of a default that a target refuses; powers of two, as engines have kernels for


@dataclass(frozen=True)
class Assign(Pass):
    """Gives every site a scheme.

    The linear layers behind which no other follows (the output projection of a language model, the scores of a
    classifier) stay in float unless an override names them: their error reaches the output undamped, and their weight
    is often the embedding table. So do layers that choose among experts: they are small, and a row sent to another
    expert is no small error. And so do layers with one output channel, such as the gate of a shared expert: they save
    nothing, and no engine packs them.

    Attributes:
        scheme: a scheme name, see `Scheme.parse`.
        group_size: elements per scale where the name gives none; -1: per output channel. None: 128 where formats
            have groups, or the largest of 64, 32 and 16 that all targets can hold where one of them refuses that.
        symmetric: whether there is no zero point, where the name does not say.
        scale_dtype: the dtype scales are stored in; None: the weight's own.
        overrides: glob pattern of site names → scheme name, or None for float. The last match wins.

    Raises:
        RecipeError: for an unknown scheme, or a pattern that matches no site.
    """

    scheme: str | None = "w4a16"
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: str | None = None
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    effect: ClassVar[Effect] = Effect.ANALYSIS
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    establishes: ClassVar[frozenset[str]] = frozenset({SCHEMES})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "overrides", dict(self.overrides))  # not the caller's, which may change
        for name in (self.scheme, *self.overrides.values()):
            self._parse(name)

    def agrees_with(self, implied: Pass) -> bool:
        """Whether the default scheme is the same; overrides may refine what a shorthand says."""
        return isinstance(implied, Assign) and self._parse(self.scheme) == implied._parse(implied.scheme)

    def _parse(self, name: str | None) -> Scheme:
        if name is None:
            return Scheme()
        return Scheme.parse(name, group_size=self.group_size, symmetric=self.symmetric, scale_dtype=self.scale_dtype)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Writes ``graph.schemes``."""
        sites = graph.sites()
        last, choosing = _last_sites(graph), routers(graph)
        unmatched = set(self.overrides)
        skips, by_default = [], []
        for site in sites:
            name, reason = self.scheme, "no scheme is assigned"
            if site.name in last:
                name, reason = None, "output projection, left in float; name it in an override to quantize it"
            elif site.name in choosing:
                name, reason = None, "chooses among experts, left in float; name it in an override to quantize it"
            elif site.out_features == 1:
                name, reason = None, "one output channel, left in float; name it in an override to quantize it"
            for pattern, override in self.overrides.items():
                if fnmatchcase(site.name, pattern):
                    unmatched.discard(pattern)
                    name, reason = override, f"left in float by override {pattern!r}"
            graph.schemes[site.name] = self._parse(name)
            if self._takes_default_group(name):
                by_default.append(site)
            if name is None:
                skips.append(Skip(site.name, self.name, reason, asked=True))
        if unmatched:
            ends = (f"*.{site.name.rpartition('.')[2]}" for site in sites if "." in site.name)
            names = dict.fromkeys([*(site.name for site in sites), *ends])
            near, listed = did_you_mean(min(unmatched).strip("*."), names), "`qcompiler inspect MODEL` lists the sites"
            raise RecipeError(
                "an override matches no site",
                got=", ".join(sorted(unmatched)),
                expected="patterns of site names, such as " + ", ".join(site.name for site in sites[:3]),
                remedy=f"{near} {listed}" if near else listed,
            )
        return PassResult(modified=False, skips=tuple(skips), notes=_fit_groups(graph, by_default, context.targets))

    def _takes_default_group(self, name: str | None) -> bool:
        """Whether a scheme has groups whose size neither its name nor an option says."""
        if name is None or self.group_size is not None:
            return False
        weight, other = self._parse(name).weight, replace(self, group_size=_GROUPS[0])._parse(name).weight
        return weight is not None and weight.granularity == "per_group" and weight != other


@dataclass(frozen=True)
class ShorthandQuantizer(WeightQuantizer):
    """A weight quantizer whose first options say what an `Assign` ahead of it would.

    Attributes:
        bits: of the weights; None: schemes are assigned already.
        group_size: elements per scale; -1: per output channel.
        symmetric: no zero point.

    Raises:
        RecipeError: for bits or groups that no scheme has, or groups without bits.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.implied_passes()  # a shorthand that means nothing is refused here

    def implied_passes(self) -> tuple[Pass, ...]:
        """An `Assign` where ``bits`` is given."""
        if self.bits is not None:
            return (Assign(f"w{self.bits}a16", group_size=self.group_size, symmetric=self.symmetric),)
        if self.group_size is None and self.symmetric is None:
            return ()
        raise RecipeError(
            "group_size and symmetric are shorthand for an Assign, as bits is",
            got=f"group_size={self.group_size}, symmetric={self.symmetric} without bits",
            expected="bits besides, or an Assign ahead that says it",
        )


def _fit_groups(graph: Graph, sites: Sequence[Site], targets: Sequence[Target]) -> tuple[str, ...]:
    """Gives layers smaller groups where a target refuses the default, and the size is all that it minds.

    Args:
        graph: with schemes, which are changed.
        sites: layers that have the default.
        targets: all of them must take every layer.

    Returns:
        For each new size, a sentence that names layers and sizes.
    """
    has_one = any(target.has_one_group for target in targets)
    changed: dict[tuple[int | None, int], list[str]] = {}
    for together in [sites] if has_one else [[site] for site in sites]:
        if _are_taken({site: graph.schemes[site.name] for site in together}, targets):
            continue
        for size in _GROUPS:
            found = {site: _with_groups(graph.schemes[site.name], size) for site in together}
            if all(site.in_features % size == 0 for site in found) and _are_taken(found, targets):
                for site, scheme in found.items():
                    changed.setdefault((_group(graph.schemes[site.name]), size), []).append(site.name)
                    graph.schemes[site.name] = scheme
                break
    return tuple(
        f"groups of {size} instead of {default}, the default, in {_count(names)} ({_some(names)}): "
        f"the most that {' and '.join(dict.fromkeys(target.name for target in targets))} can hold; "
        "a size that a scheme's name gives is kept, or refused"
        for (default, size), names in changed.items()
    )


def _are_taken(schemes: Mapping[Site, Scheme], targets: Sequence[Target]) -> bool:
    for target in targets:
        if any(target.supports(scheme, site.in_features).status == "refused" for site, scheme in schemes.items()):
            return False
        sizes = {scheme.weight.group_of(site.in_features) for site, scheme in schemes.items() if scheme.weight}
        if target.has_one_group and len(sizes) > 1 and any(site.in_features > min(sizes) for site in schemes):
            return False
    return True


def _with_groups(scheme: Scheme, size: int) -> Scheme:
    assert scheme.weight is not None
    return replace(scheme, weight=replace(scheme.weight, group_size=size))


def _group(scheme: Scheme) -> int | None:
    return None if scheme.weight is None else scheme.weight.group_size


def _count(names: Sequence[str]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names)} layers"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _last_sites(graph: Graph) -> set[str]:
    """Sites of a language model or a classifier that no other site reads from."""
    ends = [node for node, port in zip(graph.outputs, graph.signature.outputs, strict=True) if port.role in _RESULTS]
    sites = graph.sites()
    if not ends or len(sites) < 2:
        return set()
    read = ancestors([source for site in sites for node in site.nodes for source in node.all_input_nodes])
    reaching = ancestors(ends)
    return {s.name for s in sites if not read.intersection(s.nodes) and reaching.intersection(s.nodes)}
