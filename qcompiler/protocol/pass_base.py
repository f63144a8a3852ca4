"""What a pass is: its declared effect, its place in a pipeline, and what it is given and gives back in a sweep."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompiler.errors import PipelineError
from qcompiler.ir import CacheFormat, Graph, Segment, Site
from qcompiler.protocol.options import check_options
from qcompiler.protocol.statistics import Statistic
from qcompiler.protocol.target import Target

__all__ = [
    "ACTIVATIONS_QUANTIZED",
    "CACHE_QUANTIZED",
    "CANONICAL",
    "DROP",
    "FISHER",
    "FLOAT_ACTIVATIONS",
    "FLOAT_CACHE",
    "FLOAT_WEIGHTS",
    "SCHEMES",
    "WEIGHTS_QUANTIZED",
    "CalibrationRun",
    "Effect",
    "Pass",
    "PassContext",
    "PassResult",
    "Rescale",
    "SiteReport",
    "Skip",
    "Tap",
    "Wave",
]

Wave = Sequence[Site]
"""Sites that are rewritten together, from statistics gathered together."""

CANONICAL = "canonical operators"
SCHEMES = "schemes"
FLOAT_WEIGHTS = "float weights"
FLOAT_ACTIVATIONS = "float activations"
FLOAT_CACHE = "a float cache"
WEIGHTS_QUANTIZED = "quantized weights"
ACTIVATIONS_QUANTIZED = "quantized activations"
CACHE_QUANTIZED = "a quantized cache"
FISHER = "Fisher information of the weights as they are"


class Effect(Enum):
    """What a pass may do to the function the graph computes."""

    ANALYSIS = "the same graph"
    EXACT = "the same function"
    APPROXIMATE = "a bounded change"


@dataclass(frozen=True)
class Tap:
    """A statistic wanted at a value of the graph."""

    value: fx.Node
    kind: type[Statistic]


@dataclass(frozen=True)
class SiteReport:
    """What a pass did at one site.

    Attributes:
        site: its name.
        method: the pass.
        scheme: the number format, as text.
        sqnr_db: signal to noise ratio of the rewritten weight or activation; not a number where it was not measured.
        output_error: squared error of the layer's output on the calibration inputs, relative to the output's square;
            None without calibration.
        rtn_output_error: the same for round-to-nearest.
        seconds: time of the solve.
        details: anything else a reader may want, as plain JSON values.
    """

    site: str
    method: str
    scheme: str
    sqnr_db: float
    output_error: float | None = None
    rtn_output_error: float | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A site a pass left alone, and why.

    Attributes:
        site: its name.
        method: the pass.
        reason: why.
        asked: whether the recipe says that it is to be left alone; otherwise ``strict`` makes an error of it.
    """

    site: str
    method: str
    reason: str
    asked: bool = False


@dataclass(frozen=True, eq=False)
class Rescale:
    """What became of a tapped value: every channel was multiplied by a factor.

    Attributes:
        factor: float ``[channels]``. The Gram matrix of the value becomes ``D G D`` with ``D = diag(factor)``.
    """

    factor: Tensor


class Drop(Enum):
    """The type of `DROP`."""

    DROP = "drop"


DROP = Drop.DROP
"""What became of a tapped value: something else; its statistics are gathered anew."""


@dataclass(frozen=True)
class PassResult:
    """What `Pass.run` or `Pass.rewrite` did.

    Attributes:
        modified: whether the graph or its weights changed.
        sites: one report per site that was rewritten.
        skips: one entry per site that was left alone.
        statistics: what became of tapped values, for those that later passes tap too; an entry of one kind goes for all
            kinds at its value that have none. Without an entry, an exact pass has left a value as it was, and an
            approximate one has changed those that depend on the sites of the wave.
        regions: one entry per region found or refused, see `CompileReport.regions`.
        notes: sentences for the report.
    """

    modified: bool
    sites: tuple[SiteReport, ...] = ()
    skips: tuple[Skip, ...] = ()
    statistics: Mapping["Tap", "Rescale | Drop"] = field(default_factory=dict)
    regions: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationRun:
    """What a pass on the whole graph that is calibrated works with.

    Attributes:
        batches: calibration inputs, one value per placeholder each.
        work_dir: a directory, to be made, for what need not be in memory; it is removed behind the last pass.
        value_budget: bytes of calibration values to hold in memory.
        progress: called with steps done, steps in all, and a description.
    """

    batches: Sequence[Mapping[fx.Node, Tensor]]
    work_dir: Path
    value_budget: int
    progress: Callable[[int, int, str], None] | None = None


@dataclass(frozen=True)
class PassContext:
    """What a pass is given beside the graph.

    Attributes:
        graph: the graph being rewritten.
        device: where to compute.
        seed: the only source of randomness.
        segment: the segment being rewritten; None outside of a sweep.
        calibration: for a pass that implements `Pass.run` and is calibrated; None for others.
        targets: where the result is meant to go; all of them will be asked about every scheme.
        ties: names of layers that share what scales a whole tensor, disjoint; see `Target.ties`.
    """

    graph: Graph
    device: torch.device
    seed: int
    segment: Segment | None = None
    calibration: CalibrationRun | None = None
    targets: Sequence[Target] = ()
    ties: Sequence[frozenset[str]] = ()

    def weight(self, site: Site) -> Tensor:
        """The float weight of a site, float32 ``[out, in]`` on `device`."""
        return self.graph.weights.read(site.weight).to(self.device, torch.float32)

    def scale_dtype(self, site: Site) -> torch.dtype:
        """The dtype scales of a site are stored in."""
        spec = self.graph.schemes[site.name].weight
        assert spec is not None
        return spec.scale_torch_dtype(getattr(torch, self.graph.source_dtype(site.weight)))

    def generator(self, site: Site) -> torch.Generator:
        """Random numbers that depend on the seed and the site alone."""
        digest = hashlib.sha256(f"{self.seed}/{site.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass(frozen=True)
class Pass:
    """Base of all passes; an instance is a frozen dataclass of its options.

    A pass on the whole graph implements `run`. A pass that works in the sweep, segment by segment, implements `rewrite`
    and, where it needs calibration, `statistics`.

    Options are checked against their annotations when an instance is made (`options`); a ``__post_init__`` of
    one's own calls ``super().__post_init__()`` first.

    Class attributes:
        effect: what it may change.
        requires, establishes, invalidates: facts about the graph, by which a pipeline proves its order.
        barrier: it decides only after it has seen everything, so the passes behind it need a sweep of their own.
        rewrites_upstream: it changes nodes of the segment ahead of the sites it rewrites (folds a scale into the norm
            they read from), so the segment is run again from its start after every change.
    """

    effect: ClassVar[Effect]
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL})
    establishes: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    barrier: ClassVar[bool] = False
    rewrites_upstream: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def name(self) -> str:
        """The name in reports and logs: ``SmoothQuant`` → ``smooth-quant``, ``KVCache`` → ``kv-cache``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(self).__name__).lower()

    @property
    def works_in_sweep(self) -> bool:
        """Whether it implements `rewrite`."""
        return type(self).rewrite is not Pass.rewrite

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs calibration inputs: statistics of activations, or ``context.calibration``."""
        return type(self).statistics is not Pass.statistics

    def implied_passes(self) -> tuple["Pass", ...]:
        """Passes this one stands for when given alone: ``GPTQ(bits=4)`` implies an ``Assign``."""
        return ()

    def agrees_with(self, implied: "Pass") -> bool:
        """Whether this pass, given by the user, also does what another one implies (a pass of the same type)."""
        return self == implied

    def check(self, graph: Graph) -> None:
        """Refuses, before its stage computes anything, a graph that the pass cannot work on."""

    def cache_formats(self) -> tuple[CacheFormat, ...]:
        """The formats it gives key-value caches, for targets to be asked about."""
        return ()

    def planned_caches(self, graph: Graph) -> dict[str, CacheFormat]:
        """The caches that it will quantize in a graph, by name, for targets to be asked about."""
        return {}

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrites the whole graph, before the sweep of its stage."""
        raise PipelineError("this pass implements neither run nor rewrite", where=type(self).__name__)

    def waves(self, segment: Segment, graph: Graph) -> list[Wave]:
        """The sites of a segment in the groups in which they are rewritten; by default one group of all."""
        return [segment.sites] if segment.sites else []

    def statistics(self, wave: Wave, graph: Graph) -> list[Tap]:
        """What must be gathered before a wave is rewritten."""
        return []

    def rewrite(self, wave: Wave, statistics: Mapping[Tap, Any], context: PassContext) -> PassResult:
        """Rewrites the sites of a wave."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options as plain JSON values, for reports and manifests."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number, and null would be another option
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
