"""What a target is: what it takes is asked ahead of calibration, not found out behind; then it lowers."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat, Graph, quantized_tables, with_float_tables
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol.artifact import Artifact, RunsInputs
from qcompiler.protocol.options import check_options

__all__ = [
    "Compilation",
    "Lowered",
    "Progress",
    "Reader",
    "Support",
    "SupportStatus",
    "Target",
    "check_caches",
    "check_schemes",
    "tied_layers",
    "with_taken_tables",
]

SupportStatus = Literal["fused", "runs", "writes-only", "refused"]
Progress = Callable[[int, int, str], None]


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


@dataclass(frozen=True)
class Reader:
    """Somebody's code that runs what was lowered, to hold it against the native artifact.

    Attributes:
        open: what runs it.
        entry: the name of the comparison in the target's report.
        tolerance: the largest difference of logits that is allowed, relative to the largest logit, beside what the
            errors of ``dtype`` make of them.
        dtype: what the values of the graph are rounded to.
        rounded: names of the graph's nodes that are; None: all.
        tokens: to compare on, ``(sequences, length)``.
        steps: how many tokens are appended to the cache one by one, behind the first half of them, ahead of the rest at
            once; None: all the others. Few where each one reads all weights.
        held_out_tokens: that are run ahead of the comparison, where there are any: a reader may refuse what only real
            text shows.
        open_for_inputs: what runs it where the model takes no token ids; None: it is not compared then.
    """

    open: Callable[[], Artifact]
    entry: str = "parity"
    tolerance: float = 1e-3
    dtype: torch.dtype = torch.float32
    rounded: Collection[str] | None = None
    tokens: tuple[int, int] = (2, 32)
    steps: int | None = None
    held_out_tokens: int = 0
    open_for_inputs: Callable[[], RunsInputs] | None = None


@dataclass(frozen=True)
class Compilation:
    """How a model was compiled, for a target that tells it to those who get the files.

    Attributes:
        recipe: the passes in order, ``pass`` and ``options`` of each; empty where another program quantized the model.
        calibration: ``source``, ``samples``, ``length`` of the tokens, ... (`CalibrationTokens.to_dict`); None without.
        held_out: what was measured on tokens that calibration did not see (`HeldOutCheck.measure`); None without.
        tokens: those tokens, int64 ``[rows, length]``; None without.
    """

    recipe: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] | None = None
    held_out: Mapping[str, Any] | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Lowered:
    """What a target made of a graph.

    Attributes:
        report: what it came to, as plain JSON values: ``notes`` and, where files were written, ``bytes``, at least.
        model: where nothing is written, what runs.
        readers: who reads it, to compare.
        device: where the native artifact is run beside them, such as ``cpu`` or ``cuda:0``.
        finish: where files were written, what is called when the readers have been compared: it may add to the files,
            and to ``report``.
    """

    report: dict[str, Any]
    model: Artifact | None = None
    readers: Sequence[Reader] = ()
    device: str = "cpu"
    finish: Callable[[Compilation], None] | None = None


@dataclass(frozen=True)
class Target(ABC):
    """Base of all targets, which compiled models are lowered to; an instance is a frozen dataclass of its options.

    Options are checked against their annotations when an instance is made; ``Annotated[..., Doc("...")]`` says what
    one is for. A ``__post_init__`` of one's own calls ``super().__post_init__()`` first.

    Class attributes:
        name: on the command line, in reports, and of the directory it is given in an output.
        main_file: the file of such a directory that appears last, and by which it is recognised; None: nothing is
            written, a model in memory comes out.
        packages: the modules it needs, by the names ``pip`` installs them under.

    Raises:
        TargetError: for an option it does not take.
    """

    name: ClassVar[str]
    main_file: ClassVar[str | None] = None
    packages: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        check_options(self, TargetError)

    @abstractmethod
    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer with ``width`` input channels under ``scheme``."""

    def ties(self, graph: Graph) -> Sequence[Sequence[str]]:
        """The layers that its engines make one layer of, by name; by default none.

        They are rounded as one weight where their format scales a whole tensor by one number (a scale per tensor, the
        factor of NVFP4): codes are computed with the number that all of them have.

        Args:
            graph: with schemes, ahead of calibration.
        """
        return ()

    @property
    def has_one_group(self) -> bool:
        """Whether all layers that have groups must have groups of one size; by default each may have its own."""
        return False

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache of this format; by default it is refused."""
        return Support("refused", "float caches alone", "leave the cache in float")

    def supports_table(self, spec: QuantSpec, width: int) -> Support:
        """What becomes of an embedding table of this format and so many channels.

        Where it is refused, as by default, the target gets a graph with a float table of the same numbers.
        """
        return Support("refused", "float embedding tables alone")

    def check_graph(self, graph: Graph) -> None:  # noqa: B027 - not every target has something to refuse
        """Refuses, ahead of everything long, what it will not take of a graph that no pass has rewritten yet.

        Raises:
            TargetError: that names operator and node.
            MissingDependencyError: without a package that lowering needs.
        """

    def check_assigned(self, graph: Graph) -> None:  # noqa: B027 - as above
        """Refuses, once schemes are assigned and ahead of calibration, layers that it does not take beside each other.

        Args:
            graph: with `Graph.schemes`; `supports` has been asked about each of them.

        Raises:
            TargetError: that names the layers.
        """

    def check_cached(self, formats: Mapping[str, CacheFormat | None]) -> None:  # noqa: B027 - as above
        """Refuses, ahead of calibration, caches that it does not take beside each other.

        Args:
            formats: of all keys and values, by the names that reports have for them; None for those in float.
                `supports_cache` has been asked about each.

        Raises:
            TargetError: that names the cache.
        """

    @abstractmethod
    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Makes files, or a model, of a quantized graph, which is not changed.

        Args:
            graph: one that `check_graph`, `supports` and `check_assigned` have let pass.
            directory: an empty one, whose files become visible together afterwards; None where nothing is written.

        Raises:
            TargetError: for what it does not take.
        """

    def lower_showing(self, graph: Graph, directory: Path, progress: Progress) -> Lowered:
        """As `lower` to files, for targets that take long: says how far it is; by default it says nothing.

        Args:
            graph, directory: as of `lower`.
            progress: is told steps done, steps in all (0 where nobody knows) and what is being done.
        """
        return self.lower(graph, directory)

    def lower_streamed(self, graph: Graph) -> Lowered:
        """As `lower` to a model in memory, for who compares it and keeps it not.

        By default the same; a target may give a model that has some of its weights in memory at a time.
        """
        return self.lower(graph, None)

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """What runs a directory that this target wrote.

        Args:
            directory: with the main file.
            exact: compute as written, not faster and a little off.
            device: ``cpu``, ``cuda`` or ``auto``.

        Raises:
            TargetError: if nothing here runs it.
        """
        raise TargetError("nothing here runs what this target writes", where=directory, got=cls.name)

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        """Whether it wrote a directory, for sure: no other is ever replaced."""
        return False

    @classmethod
    def variants(cls) -> Mapping[str, "Target"]:
        """What tables of support tell apart: by heading; by default the target with its default options."""
        return {cls.name: cls()}

    @classmethod
    def missing_packages(cls) -> list[str]:
        """What ``pip`` would have to install for it."""
        return [name for module, name in cls.packages.items() if importlib.util.find_spec(module) is None]


def tied_layers(graph: Graph, targets: Sequence[Target]) -> list[frozenset[str]]:
    """What targets tie together, those that have a layer in common joined."""
    found: list[frozenset[str]] = []
    for names in (frozenset(tie) for target in targets for tie in target.ties(graph)):
        touching = [tie for tie in found if tie & names]
        found = [*(tie for tie in found if not tie & names), names.union(*touching)]
    return found


def check_schemes(
    schemes: Mapping[str, Scheme], widths: Mapping[str, int], targets: Sequence[Target]
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


def check_caches(formats: Sequence[CacheFormat], targets: Sequence[Target]) -> dict[str, dict[str, Support]]:
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


def with_taken_tables(graph: Graph, target: Target) -> Graph:
    """The graph itself, or a copy with embedding tables in float, where a target does not take theirs."""
    found = [target.supports_table(table.spec, table.columns) for table in quantized_tables(graph) if table.spec]
    return with_float_tables(graph) if any(support.status == "refused" for support in found) else graph
