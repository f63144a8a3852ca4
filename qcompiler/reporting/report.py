"""What a compilation did, as plain JSON values: `report.json`, and the summary printed at the end."""

import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qcompiler.errors import ArtifactError
from qcompiler.ir import Graph, is_quantized_weight, stored_names
from qcompiler.protocol import SiteReport, Skip

__all__ = ["CompileReport", "machine", "peak_rss_bytes", "quantized_bits_per_weight", "strict_json"]


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, str]:
    """Processor, threads and versions that a measurement depends on."""
    import transformers

    import qcompiler

    return {
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "qcompiler": qcompiler.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass(repr=False)
class CompileReport:
    """What a compilation did.

    Attributes:
        sites: one entry per site that was rewritten.
        skipped: one entry per site that was left alone, with its reason.
        regions: what may share a scale or a rotation, one entry each: ``name``, ``kind``, ``producers``, ``consumers``,
            ``channels``, ``status`` (``folded``, ``refused`` or ``found``), ``reason`` and ``details``.
        unrecognized: what canonicalization left as it was.
        notes: sentences the user should read.
        sweeps: how many times the model was gone through.
        segments: pieces per sweep.
        seconds: of wall time, by phase.
        cpu_seconds: of all threads, by phase.
        peak_rss_bytes: the largest resident memory of the process.
        bytes_before, bytes_after: weights as stored.
        parameters: elements of the original model.
        cache_bytes_per_token: bytes that one token of one sequence takes in the cache, scales included; None without.
        calibration: where the tokens came from; ``use`` is ``measurement`` where nothing is calibrated; None without.
        held_out: what was measured on tokens that calibration did not see (`HeldOutCheck.measure`); None without.
        bytes_spilled: calibration values that went to disk.
        targets: one entry per lowering.
        machine: processor, threads and versions it ran with.
    """

    sites: list[SiteReport] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    unrecognized: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sweeps: int = 0
    segments: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    parameters: int = 0
    cache_bytes_per_token: int | None = None
    calibration: Mapping[str, Any] | None = None
    held_out: dict[str, Any] | None = None
    bytes_spilled: int = 0
    targets: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=machine)

    def __repr__(self) -> str:
        sites, skipped = ({entry.site for entry in entries} for entries in (self.sites, self.skipped))
        size = f"{self.bytes_after / 2**20:,.1f} MiB, {self.bits_per_weight:.2f} bits per weight"
        return f"<CompileReport: {len(sites)} sites rewritten, {len(skipped)} left alone, {size}>"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the whole model, per parameter of the original."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the wall and CPU time of a block to a phase."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - wall
            self.cpu_seconds[phase] = self.cpu_seconds.get(phase, 0.0) + time.process_time() - cpu

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; a number that is infinite or not one becomes None."""
        fields = asdict(self)
        fields["bits_per_weight"] = self.bits_per_weight
        found: dict[str, Any] = strict_json({"schema": 1, **fields})
        return found

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CompileReport":
        """Rebuilds a report from `to_dict`.

        Raises:
            ArtifactError: if the fields are not those of a report.
        """
        try:
            known = {key: value for key, value in fields.items() if key in cls.__dataclass_fields__}
            known["sites"] = [
                SiteReport(**{**site, "sqnr_db": math.inf if site["sqnr_db"] is None else site["sqnr_db"]})
                for site in known.get("sites", [])
            ]
            known.setdefault("machine", {})  # not this one
            known["skipped"] = [Skip(**skip) for skip in known.get("skipped", [])]
            return cls(**known)
        except (TypeError, KeyError, AttributeError) as error:
            raise ArtifactError("damaged report", got=f"{type(error).__name__}: {error}") from error


def strict_json(value: Any) -> Any:
    """Plain JSON values in which a number that is infinite or not one is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def quantized_bits_per_weight(graph: Graph) -> float | None:
    """Stored bits per element over the quantized sites alone; None where nothing is quantized."""
    bits = elements = 0
    for site in graph.sites():
        weight = site.nodes[0].args[1]
        if is_quantized_weight(weight):
            bits += 8 * graph.weights.stored_bytes(stored_names(weight))  # type: ignore[arg-type]
            elements += site.out_features * site.in_features
    return bits / elements if elements else None
