"""What a GPU or a CPU holds, reads and multiplies: from ``hardware.toml``, and from files of the user's own."""

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qcompiler.errors import InputError, did_you_mean
from qcompiler.storage import read_named

__all__ = ["TYPES", "Hardware", "find_hardware", "known_hardware", "own_file"]

Kind = Literal["server", "workstation", "cpu"]
TYPES = ("float32", "float16", "bfloat16", "int8", "int4", "float8", "float4")
"""Of operands of matrix products."""
_FIELDS = {"name", "aliases", "kind", "vendor", "capability", "memory_gb", "bandwidth_gb_s", "types", "rates", "source"}
_NEEDED = ("name", "kind", "memory_gb", "bandwidth_gb_s", "types", "source")
_MOST = 1e6  # of any figure: memory of a petabyte, a bandwidth of a petabyte per second, an exaflop


@dataclass(frozen=True)
class Hardware:
    """One processor with its memory.

    Attributes:
        key: by which it is asked for.
        name: for people.
        kind: ``server``: shared by many; ``workstation``: one person's card; ``cpu``.
        memory: bytes.
        bandwidth: bytes per second that its memory gives.
        types: operands its matrix units multiply, of `TYPES`.
        rates: dense operations per second by type; what is unknown is missing.
        source: of the figures.
        vendor: as in ``nvidia``; empty: unknown.
        capability: of CUDA, such as 90; None elsewhere.
        aliases: other keys.
    """

    key: str
    name: str
    kind: Kind
    memory: float
    bandwidth: float
    types: frozenset[str]
    rates: Mapping[str, float]
    source: str
    vendor: str = ""
    capability: int | None = None
    aliases: Sequence[str] = field(default=())

    @property
    def float_type(self) -> str:
        """The float type of 16 or 32 bits that is multiplied fastest."""
        return max(("float16", "bfloat16", "float32"), key=lambda name: self.rates.get(name, 0.0))

    def rate(self, operands: str) -> float | None:
        """Dense operations per second; None: unknown, or not taken."""
        return self.rates.get(operands)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, in the units of the file."""
        return {
            "key": self.key,
            "name": self.name,
            "kind": self.kind,
            "vendor": self.vendor,
            "capability": self.capability,
            "memory_gb": self.memory / 1e9,
            "bandwidth_gb_s": self.bandwidth / 1e9,
            "types": [name for name in TYPES if name in self.types],
            "rates": {name: rate / 1e12 for name, rate in self.rates.items()},
            "source": self.source,
        }


def own_file() -> Path:
    """Where a user's own hardware is read from without being named."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "qcompiler" / "hardware.toml"


def known_hardware(file: Path | None = None) -> dict[str, Hardware]:
    """All hardware by its key: what comes along, then `own_file` if there is one, then a file that is named.

    Raises:
        InputError: for a file that cannot be read, or says something it may not.
    """
    found = _read(Path(__file__).with_name("hardware.toml"))
    if own_file().is_file():
        found |= _read(own_file())
    if file is not None:
        found |= _read(file)
    return found


def find_hardware(name: str, known: Mapping[str, Hardware]) -> Hardware:
    """The hardware of a key or an alias, in whatever case, with spaces or hyphens.

    Raises:
        InputError: for an unknown one; the nearest names are offered.
    """
    wanted = _plain(name)
    names = {_plain(each): item for item in known.values() for each in (item.key, item.name, *item.aliases)}
    if wanted in names:
        return names[wanted]
    within = [item.key for item in known.values() if wanted and wanted in _plain(f"{item.key} {item.name}")]
    near = did_you_mean(name, [*known, *(alias for item in known.values() for alias in item.aliases)])
    if near is None and within:
        near = f"did you mean {' or '.join(within[:3])}?"
    raise InputError(
        "unknown hardware",
        got=name,
        expected=", ".join(known),
        remedy=near
        or f"`qcompiler hardware` lists them; figures of others can stand in a file: --hardware FILE, or {own_file()}",
    )


def _plain(name: str) -> str:
    plain = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    return plain.removeprefix("nvidia-").removeprefix("amd-").removeprefix("geforce-")


def _read(path: Path) -> dict[str, Hardware]:
    try:
        tables = tomllib.loads(read_named(path).decode("utf-8-sig"))
    except OSError as error:
        raise InputError("the hardware file cannot be read", where=path, got=error.strerror) from error
    except ValueError as error:
        raise InputError("the hardware file is not TOML", where=path, got=error) from error
    return {key: _build(key, table, path) for key, table in tables.items()}


def _build(key: str, table: Any, path: Path) -> Hardware:
    where = f"{path}: {key}"
    if not isinstance(table, dict):
        raise InputError("hardware is a table of fields", where=where, got=repr(table), expected=f"[{key}]")
    if unknown := sorted(set(table) - _FIELDS):
        raise InputError(
            "hardware has no such field",
            where=where,
            got=", ".join(unknown),
            expected=", ".join(sorted(_FIELDS)),
            remedy=did_you_mean(unknown[0], _FIELDS),
        )
    if missing := [name for name in _NEEDED if name not in table]:
        raise InputError("hardware lacks a field", where=where, got="none of " + ", ".join(missing))
    for name in ("name", "kind", "vendor", "source"):
        if not isinstance(table.get(name, ""), str):
            raise InputError("this field is text", where=f"{where}: {name}", got=repr(table[name]))
    if table["kind"] not in get_args(Kind):
        raise InputError("unknown kind", where=where, got=table["kind"], expected=", ".join(get_args(Kind)))
    rates, types = table.get("rates", {}), table["types"]
    if not isinstance(rates, dict) or not isinstance(types, list):
        raise InputError("types are an array, rates a table", where=where, expected='["float16"], { float16 = 100 }')
    for name in (*types, *rates):
        if name not in TYPES:
            raise InputError("unknown type of operands", where=where, got=name, expected=", ".join(TYPES))
    capability, aliases = table.get("capability"), table.get("aliases", [])
    if capability is not None and (not isinstance(capability, int) or not 10 <= capability < 1000):
        raise InputError("no CUDA capability", where=where, got=capability, expected="such as 90")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise InputError("aliases are an array of names", where=where, got=repr(aliases))
    return Hardware(
        key=key,
        name=table["name"],
        kind=table["kind"],
        memory=_figure(table["memory_gb"], f"{where}: memory_gb") * 1e9,
        bandwidth=_figure(table["bandwidth_gb_s"], f"{where}: bandwidth_gb_s") * 1e9,
        types=frozenset(types),
        rates={name: _figure(rate, f"{where}: rates.{name}") * 1e12 for name, rate in rates.items()},
        source=table["source"],
        vendor=table.get("vendor", ""),
        capability=capability,
        aliases=tuple(aliases),
    )


def _figure(value: Any, where: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 < value <= _MOST:
        raise InputError("no figure of hardware", where=where, got=repr(value), expected=f"above 0, up to {_MOST:g}")
    return float(value)
