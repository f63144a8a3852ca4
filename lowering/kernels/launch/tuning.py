"""Launch configurations: what a kernel starts with, what a search on the device found, and where that is kept.

A launcher asks `found`, which costs a dictionary access, and takes its own default where nothing was found. A search is
run by whoever has the time for it (a benchmark, or `lower` when asked to tune): `search_launches` runs a function once
to see which kernels it launches, then with every candidate of each. Results are kept per device and version of Triton
in one JSON file, ``$QCOMPILER_CACHE/tuning.json`` (default ``~/.cache/qcompiler``), rewritten whole and then renamed.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Container, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["TuningCache", "cache_path", "device_name", "found", "row_bucket", "search_launches"]

_log = logging.getLogger(__name__)

Config = TypeVar("Config")
Key = tuple[object, ...]


def cache_path() -> Path:
    """The file that found configurations are kept in."""
    return _path_below(os.environ.get("QCOMPILER_CACHE") or os.path.expanduser("~/.cache/qcompiler"))


@cache  # asked at every launch
def _path_below(root: str) -> Path:
    return Path(root) / "tuning.json"


def row_bucket(rows: int) -> int:
    """Row counts that share a configuration: 1, 2, 4, 8, ... rounded up, at most 4096."""
    return min(1 << max(0, rows - 1).bit_length(), 4096)


def device_name(device: torch.device) -> str:
    """What configurations are kept under: the name of a CUDA device, and the version of Triton."""
    index: int | None = device.index
    return _device_name(torch.cuda.current_device() if index is None else index)


@cache
def _device_name(index: int) -> str:
    import triton  # distributed under several names

    return f"{torch.cuda.get_device_name(index)}, triton {triton.__version__}"


@dataclass
class TuningCache:
    """Found configurations, by device, kernel and key.

    Attributes:
        path: of the file; read when first needed. One that is damaged counts as empty: it holds nothing that cannot be
            found again. Where it cannot be written, what was found serves this process.
    """

    path: Path

    def __post_init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] | None = None
        self._own: dict[str, dict[str, Any]] = {}
        self._known: dict[tuple[str, str, Key], Any] = {}

    def get(self, device: str, kernel: str, key: Key, make: Callable[..., Config]) -> Config | None:
        """What was found for a kernel and key: ``make(**fields)``; None if nothing, or of fields it does not take."""
        fields = self._read().get(_name(device, kernel, key))
        try:
            return None if fields is None else make(**fields)
        except TypeError:
            return None

    def get_once(
        self,
        device: str,
        kernel: str,
        key: Key,
        make: Callable[..., Config],
        candidates: Callable[[], Sequence[Config]],
    ) -> Config | None:
        """As `get`, looked up once, and only what is among the candidates, if there are any.

        Candidates are known to fit; an earlier version may have had others.
        """
        place = device, kernel, key
        if place not in self._known:
            config = self.get(device, kernel, key, make)
            allowed = candidates() if config is not None else ()
            self._known[place] = config if not allowed or config in allowed else None
        known: Config | None = self._known[place]
        return known

    def search(
        self,
        device: str,
        kernel: str,
        key: Key,
        candidates: Sequence[Config],
        measure: Callable[[Config], float],
    ) -> Config:
        """Measures every candidate (a dataclass), keeps the fastest and gives it back.

        Args:
            device: its name, and the version of Triton.
            kernel: its name.
            key: what the best configuration depends on: shape, dtype, bits.
            candidates: at least one.
            measure: seconds, or infinity for one that does not run.
        """
        best = min(candidates, key=measure)
        self._own[_name(device, kernel, key)] = asdict(best)  # type: ignore[call-overload]
        self._entries = None  # another process may have written meanwhile
        self._known.clear()
        try:
            self._write()
        except OSError as error:
            _log.warning("launch configurations serve this process alone, %s cannot be written: %s", self.path, error)
        return best

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._entries is None:
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = {}
            self._entries = (content if isinstance(content, dict) else {}) | self._own
        return self._entries

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".tuning-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._read(), file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        finally:
            Path(name).unlink(missing_ok=True)


def _name(device: str, kernel: str, key: Key) -> str:
    return "|".join([device, kernel, *map(str, key)])


@dataclass
class _Search:
    """Which kernels are launched while it is in force, and the one whose configuration is tried.

    Attributes:
        seen: candidates by kernel and key, of all that asked.
        trial: kernel, key and configuration that are answered instead of what was found.
    """

    seen: dict[tuple[str, Key], Sequence[Any]] = field(default_factory=dict)
    trial: tuple[str, Key, Any] | None = None


_SEARCH: ContextVar[_Search | None] = ContextVar("search", default=None)


def found(
    device: torch.device,
    kernel: str,
    key: Key,
    make: Callable[..., Config],
    candidates: Callable[[], Sequence[Config]] = tuple,
) -> Config | None:
    """What a search on this device kept for a kernel; None where none was run, and on devices without CUDA.

    Args:
        device: the launch is for.
        kernel: its name.
        key: hashable; what the best configuration depends on: shape with rows as `row_bucket`, dtype, bits.
        make: the dataclass of the kernel's configurations.
        candidates: what a search would try, if one is under way; what it kept counts only if it is among them.
    """
    search = _SEARCH.get()
    if search is not None:
        if search.trial is not None and search.trial[:2] == (kernel, key):
            config: Config = search.trial[2]
            return config
        if (kernel, key) not in search.seen:
            search.seen[kernel, key] = candidates()
    if device.type != "cuda":
        return None
    return _cache_at(cache_path()).get_once(device_name(device), kernel, key, make, candidates)


@cache
def _cache_at(path: Path) -> TuningCache:
    return TuningCache(path)


def search_launches(
    run: Callable[[], object],
    measure: Callable[[Callable[[], object]], float],
    device: str,
    known: Container[str] = (),
) -> dict[str, Any]:
    """Finds the fastest configuration of every kernel that a function launches, and keeps it.

    Args:
        run: launches kernels that ask `found`, the same ones at every call.
        measure: seconds that a function takes, infinity if it does not run.
        device: as `device_name` has it.
        known: kernels and keys, as returned, that are not searched for again.

    Returns:
        The configurations, by kernel and key as text; kernels without candidates are left out.
    """
    search = _Search()
    token = _SEARCH.set(search)
    chosen: dict[str, Any] = {}
    try:
        run()
        for (kernel, key), candidates in list(search.seen.items()):
            name = _name("", kernel, key)[1:]
            if not candidates or name in known:
                continue

            def seconds(config: Any, kernel: str = kernel, key: Key = key) -> float:
                search.trial = (kernel, key, config)
                return measure(run)

            best = _cache_at(cache_path()).search(device, kernel, key, candidates, seconds)
            search.trial = None
            chosen[name] = best
    finally:
        _SEARCH.reset(token)
    return chosen
