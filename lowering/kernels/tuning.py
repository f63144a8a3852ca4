"""Launch configurations: what a kernel starts with, what a search on the device found, and where that is kept.

A search is run by whoever has the time for it (a benchmark, or `lower` when asked to tune); looking up costs a
dictionary access. Results are kept per device and version of Triton in one JSON file,
``$QCOMPILER_CACHE/tuning.json`` (default ``~/.cache/qcompiler``), rewritten whole and then renamed.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["TuningCache", "cache_path", "row_bucket"]

Config = TypeVar("Config")


def cache_path() -> Path:
    """The file that found configurations are kept in."""
    root = os.environ.get("QCOMPILER_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "qcompiler") / "tuning.json"


def row_bucket(rows: int) -> int:
    """Row counts that share a configuration: 1, 2, 4, 8, ... rounded up, at most 4096."""
    return min(1 << max(0, rows - 1).bit_length(), 4096)


@dataclass
class TuningCache:
    """Found configurations, by device, kernel and key.

    Attributes:
        path: of the file; read when first needed. One that is damaged counts as empty: it holds nothing that cannot be
            found again.
    """

    path: Path

    def __post_init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] | None = None

    def get(self, device: str, kernel: str, key: tuple[object, ...], make: Callable[..., Config]) -> Config | None:
        """What was found for a kernel and key: ``make(**fields)``; None if nothing, or of fields it does not take."""
        fields = self._read().get(_name(device, kernel, key))
        try:
            return None if fields is None else make(**fields)
        except TypeError:
            return None

    def search(
        self,
        device: str,
        kernel: str,
        key: tuple[object, ...],
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
        self._read()[_name(device, kernel, key)] = asdict(best)  # type: ignore[call-overload]
        self._write()
        return best

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._entries is None:
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = {}
            self._entries = content if isinstance(content, dict) else {}
        return self._entries

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".tuning-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._read(), file, indent=1, sort_keys=True)
        os.replace(name, self.path)


def _name(device: str, kernel: str, key: tuple[object, ...]) -> str:
    return "|".join([device, kernel, *map(str, key)])
