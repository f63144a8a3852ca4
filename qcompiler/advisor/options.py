"""One recipe on one kind of GPU: does it run and fit, how fast can it be, what does it cost, who takes it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qcompiler.advisor.footprint import (
    Footprint,
    activation_bytes,
    cache_bytes,
    cache_bytes_per_token,
    fitted,
    weight_parts,
)
from qcompiler.advisor.hardware import Hardware
from qcompiler.advisor.parallel import COUNTS, divided, undivided
from qcompiler.advisor.quality import Expectation, expect_cache, expect_weights, level_of
from qcompiler.advisor.roofline import Step, decode_step, operand_type, prefill_seconds
from qcompiler.advisor.shapes import ModelShape
from qcompiler.ir import CacheFormat
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import SupportStatus, Target

__all__ = [
    "GOALS",
    "NONE",
    "USABLE",
    "Candidate",
    "Goal",
    "Offer",
    "Option",
    "Question",
    "Refusal",
    "Taker",
    "decode_seconds",
    "evaluate",
]

Goal = Literal["quality", "latency", "throughput", "memory", "training"]
GOALS: tuple[Goal, ...] = ("quality", "latency", "throughput", "memory", "training")
NONE = "none"
"""The name of the candidate that quantizes nothing."""
USABLE = 0.9
"""Of memory, that weights, caches and activations may take: what vLLM takes by default; the rest is the runtime's."""
_MOST_SEQUENCES = 1024  # at once: what vLLM schedules at most by default on server GPUs
_LONGEST = 1 << 24


@dataclass(frozen=True)
class Candidate:
    """A recipe as far as its formats go.

    Attributes:
        name: as ``--recipe`` takes it; `NONE`: leave the model as it is.
        scheme: of attention, MLPs and experts.
        keys, values: formats of the cache; None: 16 bits.
        table: of the embedding; None: float.
        passes: by their classes' names.
        kept_apart: the share of weights that a codebook keeps apart.
    """

    name: str
    scheme: Scheme
    keys: CacheFormat | None = None
    values: CacheFormat | None = None
    table: QuantSpec | None = None
    passes: tuple[str, ...] = ()
    kept_apart: float = 0.0


@dataclass(frozen=True)
class Offer:
    """A target that may be asked.

    Attributes:
        text: as ``--to`` takes it.
        target: itself.
        engine: whose answers it gives: what runs what it writes.
        serves: whether engines that serve many requests at once load what it writes.
    """

    text: str
    target: Target
    engine: str
    serves: bool


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        shape: of the model.
        hardware: of each GPU.
        context: tokens of each sequence.
        batch: sequences at once.
        gpus: that share the model.
        goal: what is to be good.
    """

    shape: ModelShape
    hardware: Hardware
    context: int
    batch: int
    gpus: int
    goal: Goal

    @property
    def usable(self) -> float:
        """Bytes of one GPU."""
        return self.hardware.memory * USABLE

    @property
    def serves_many(self) -> bool:
        """Whether requests of several people come together: on servers, and wherever more than one is asked for."""
        return self.hardware.kind == "server" or self.batch > 1


@dataclass(frozen=True)
class Taker:
    """A target that takes a recipe.

    Attributes:
        text: as ``--to`` takes it.
        engine: what runs it.
        layers, cache: how far that goes; of a float cache ``fused``.
        serves: as of `Offer`.
    """

    text: str
    engine: str
    layers: SupportStatus
    cache: SupportStatus
    serves: bool

    @property
    def rank(self) -> int:
        """0: engines that serve run it fused; 1: something runs it fused; 2: dequantized on the way."""
        if self.layers == self.cache == "fused":
            return 0 if self.serves else 1
        return 2 if "writes-only" not in (self.layers, self.cache) else 3


@dataclass(frozen=True)
class Refusal:
    """A recipe that is out, and why; ``lacking``: bytes of one GPU, where memory is the reason."""

    name: str
    reason: str
    lacking: float = 0.0


@dataclass(frozen=True)
class Option:
    """A recipe that runs and fits.

    Attributes:
        candidate: the recipe.
        takers: targets that take it, the best first; none are needed where nothing is quantized.
        layers_rank: the best rank of a target that takes its layers, whatever of its cache.
        footprint: of one GPU.
        parts: bytes of weights by part, of all GPUs.
        left: bytes of one GPU that nothing needs.
        gpus_needed: the fewest that it fits.
        longest_context: at this batch.
        largest_batch: at this context.
        tokens_held: by the caches that memory has room for.
        cache_per_token: bytes, of all GPUs.
        decode: the bound of a step.
        tokens_per_second: of all sequences together, at the largest batch.
        prefill: seconds that the prompts of a batch take at least, each as long as the context; None: unknown.
        weights, cache: expected losses.
        undivided: what does not divide among the GPUs.
    """

    candidate: Candidate
    takers: tuple[Taker, ...]
    layers_rank: int
    footprint: Footprint
    parts: dict[str, float]
    left: float
    gpus_needed: int | None
    longest_context: int
    largest_batch: int
    tokens_held: float
    cache_per_token: int
    decode: Step
    tokens_per_second: float
    prefill: float | None
    weights: Expectation
    cache: Expectation
    undivided: tuple[str, ...]

    @property
    def loss(self) -> float | None:
        """Nats per token, of both."""
        known = self.weights.loss is not None and self.cache.loss is not None
        return (self.weights.loss or 0.0) + (self.cache.loss or 0.0) if known else None

    @property
    def levels(self) -> tuple[int, int]:
        """Of the losses of weights and cache. A cache of fewer than 8 bits is at least level 1: its losses were
        measured on short texts, and grow with what is read back.
        """
        narrow = any(spec is not None and spec.bits < 8 for spec in (self.candidate.keys, self.candidate.values))
        return level_of(self.weights.loss), max(level_of(self.cache.loss), int(narrow))

    @property
    def cache_rank(self) -> int:
        """The best rank of a target that takes layers and cache."""
        return self.takers[0].rank if self.takers else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: bytes and seconds."""
        return {
            "recipe": self.candidate.name,
            "weight_bytes": sum(self.parts.values()),
            "weight_bytes_by_part": self.parts,
            "cache_bytes_per_token": self.cache_per_token,
            "per_gpu": {
                "weights": self.footprint.weights,
                "cache": self.footprint.cache,
                "activations": self.footprint.activations,
                "left": self.left,
            },
            "gpus_needed": self.gpus_needed,
            "longest_context": self.longest_context,
            "largest_batch": self.largest_batch,
            "tokens_held": None if self.tokens_held == math.inf else int(self.tokens_held),
            "decode_seconds": self.decode.seconds,
            "decode_is_compute_bound": self.decode.is_compute_bound,
            "tokens_per_second_at_largest_batch": self.tokens_per_second,
            "prefill_seconds": self.prefill,
            "expected_loss": self.loss,
            "expected_loss_of_weights": {"nats": self.weights.loss, "source": self.weights.source},
            "expected_loss_of_cache": {"nats": self.cache.loss, "source": self.cache.source},
            "takes": [
                {"to": t.text, "engine": t.engine, "layers": t.layers, "cache": t.cache, "serves": t.serves}
                for t in self.takers
            ],
            "does_not_divide": list(self.undivided),
        }


def evaluate(candidate: Candidate, question: Question, offers: Sequence[Offer]) -> Option | Refusal:
    """Weighs one recipe.

    Args:
        candidate: the recipe.
        question: model, GPU and use.
        offers: targets that run on this hardware, in the order they are preferred in.
    """
    shape, hardware = question.shape, question.hardware
    operands = operand_type(candidate.scheme, hardware)
    if candidate.scheme.activation is not None and operands not in hardware.types:
        return Refusal(candidate.name, f"{hardware.name} does not multiply {operands}")
    caches = [spec for spec in (candidate.keys, candidate.values) if spec is not None]
    if any(spec.is_float for spec in caches) and "float8" not in hardware.types:
        return Refusal(candidate.name, f"{hardware.name} has no float8: int8 caches take as much, and lose less")
    if caches and not shape.cached_layers + shape.windowed_layers:
        return Refusal(candidate.name, "the model caches nothing")
    takers, layers_rank, reason = _takers(candidate, shape, offers)
    if candidate.name != NONE and not takers:
        return Refusal(candidate.name, reason)
    parts = weight_parts(shape, candidate.scheme, candidate.table, kept_apart=candidate.kept_apart)
    holding = _Holding(candidate, shape, parts)
    here = holding.on(question.gpus, question.context, question.batch)
    needed = next(
        (
            count
            for count in COUNTS
            if shape.heads % count == 0 and holding.on(count, question.context, question.batch).total <= question.usable
        ),
        None,
    )
    if here.total > question.usable:
        lacking = here.total - question.usable
        more = f"fits {needed} GPUs" if needed is not None else "no number of GPUs up to 64 holds it"
        return Refusal(
            candidate.name,
            f"needs {here.total / 1e9:.1f} GB of {question.usable / 1e9:.1f} GB on each GPU, "
            f"{lacking / 1e9:.1f} GB too much; {more}",
            lacking,
        )

    def fits(context: int, batch: int) -> bool:
        return holding.on(question.gpus, context, batch).total <= question.usable

    most = question.shape.positions or _LONGEST
    largest = _largest(lambda batch: fits(question.context, batch), _MOST_SEQUENCES)
    largest = max(largest, question.batch)
    return Option(
        candidate=candidate,
        takers=takers,
        layers_rank=layers_rank,
        footprint=here,
        parts=parts,
        left=question.usable - here.total,
        gpus_needed=needed,
        longest_context=_largest(lambda context: fits(context, question.batch), most),
        largest_batch=largest,
        tokens_held=_tokens_held(question, here),
        cache_per_token=cache_bytes_per_token(shape, candidate.keys, candidate.values),
        decode=holding.decode(question, question.batch),
        tokens_per_second=largest / holding.decode(question, largest).seconds,
        prefill=prefill_seconds(
            shape, hardware, operands, tokens=question.context, batch=question.batch, gpus=question.gpus
        ),
        weights=expect_weights(candidate.scheme, candidate.passes, shape.parameters),
        cache=max((expect_cache(spec) for spec in (candidate.keys, candidate.values)), key=_loss),
        undivided=undivided(shape, candidate.scheme, question.gpus),
    )


def _tokens_held(question: Question, here: Footprint) -> float:
    """Of all sequences together, as long as no window is full."""
    each = here.cache / (question.batch * question.context)
    return (question.usable - here.weights - here.activations) / each if each else math.inf


def decode_seconds(candidate: Candidate, question: Question, batch: int) -> float:
    """The bound of a step of another batch, whether that fits or not."""
    parts = weight_parts(question.shape, candidate.scheme, candidate.table, kept_apart=candidate.kept_apart)
    return _Holding(candidate, question.shape, parts).decode(question, batch).seconds


def _loss(expectation: Expectation) -> float:
    return math.inf if expectation.loss is None else expectation.loss


@dataclass(frozen=True)
class _Holding:
    """What a recipe makes a model hold."""

    candidate: Candidate
    shape: ModelShape
    parts: dict[str, float]

    def on(self, gpus: int, context: int, batch: int) -> Footprint:
        cache = batch * cache_bytes(self.shape, self.candidate.keys, self.candidate.values, context)
        return divided(self.shape, self.parts, cache, activation_bytes(self.shape, context, batch), gpus)

    def decode(self, question: Question, batch: int) -> Step:
        here = self.on(question.gpus, question.context, batch)
        is_tied = not any(matrix.part == "head" for matrix in self.shape.matrices)
        return decode_step(
            self.shape,
            question.hardware,
            operand_type(self.candidate.scheme, question.hardware),
            weights=here.weights,
            experts=self.parts.get("experts", 0.0) / question.gpus,
            table=0.0 if is_tied else self.parts.get("table", 0.0) / question.gpus,
            cache=here.cache,
            context=question.context,
            batch=batch,
            gpus=question.gpus,
        )


def _takers(candidate: Candidate, shape: ModelShape, offers: Sequence[Offer]) -> tuple[tuple[Taker, ...], int, str]:
    """Targets that take layers and cache, the best rank of one that takes the layers, and why there is none."""
    order: tuple[SupportStatus, ...] = ("fused", "runs", "writes-only", "refused")
    found: list[Taker] = []
    ranks, reasons = [], []
    for offer in offers:
        layers = []
        for width in shape.widths():
            weight = candidate.scheme.weight
            scheme = candidate.scheme if weight is None else replace(candidate.scheme, weight=fitted(weight, width))
            layers.append(offer.target.supports(scheme, width))
        caches = [offer.target.supports_cache(spec) for spec in (candidate.keys, candidate.values) if spec is not None]
        of_layers = order[max((order.index(answer.status) for answer in layers), default=0)]
        of_caches = order[max((order.index(answer.status) for answer in caches), default=0)]
        taker = Taker(offer.text, offer.engine, of_layers, of_caches, offer.serves)
        if of_layers != "refused":
            ranks.append(replace(taker, cache="fused").rank)
        if "refused" not in (of_layers, of_caches) and taker.rank < 3:
            found.append(taker)
        reasons += [f"{offer.text}: {answer.reason}" for answer in (*layers, *caches) if answer.status == "refused"]
        if "writes-only" in (of_layers, of_caches):
            reasons.append(f"{offer.text}: written, and no engine known to run it")
    reason = "; ".join(dict.fromkeys(reasons)) or "no target runs on this hardware"
    return tuple(sorted(found, key=lambda taker: taker.rank)), min(ranks, default=0), f"nothing takes it: {reason}"


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` for which something holds that holds of all smaller ones; 0: of none."""
    below, above = 0, most + 1
    while above - below > 1:
        middle = (below + above) // 2
        if holds(middle):
            below = middle
        else:
            above = middle
    return below
