"""What a command prints for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qcompiler.reporting import print_table

__all__ = [
    "Streamed",
    "describe_engine",
    "engine_in_short",
    "print_compiled",
    "print_converted",
    "print_recipe",
    "print_targets",
]

_MOST_SKIPS = 8  # lines on the terminal


def print_compiled(summary: dict[str, Any]) -> None:
    """Prints what ``compile`` did."""
    before, after = summary["bytes_before"], summary["bytes_after"]
    print_table(
        {
            "weights": f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB",
            "bits per weight": f"{summary['bits_per_weight']:.2f}",
            "sites rewritten": len({site["site"] for site in summary["sites"]}),
            "sites left alone": len({skip["site"] for skip in summary["skipped"]}),
            "seconds": f"{summary['seconds']:.1f}",
            "peak memory": f"{summary['peak_rss_bytes'] / 2**20:,.0f} MiB",
            **_held_out_row(summary["held_out"]),
            **{
                f"written: {name}": f"{path}, {summary['artifact_bytes'][name] / 2**20:.1f} MiB"
                for name, path in summary["artifacts"].items()
            },
            **_compared_rows(summary["compared"]),
        }
    )
    skipped = summary["skipped"]
    for skip in skipped if len(skipped) <= _MOST_SKIPS else skipped[: _MOST_SKIPS - 1]:
        print(f"left alone: {skip['site']}: {skip['reason']}")
    if len(skipped) > _MOST_SKIPS:
        print(
            f"left alone: {len(skipped) - _MOST_SKIPS + 1} more, listed in {summary['artifacts']['native']}/report.html"
        )
    for note in summary["notes"]:
        print(f"note: {note}")


def print_converted(found: dict[str, Any]) -> None:
    """Prints what ``convert`` did."""
    rows: dict[str, Any] = {"seconds": f"{found['seconds']:.1f}"}
    for name, path in found["artifacts"].items():
        rows[f"written: {name}"] = f"{path}, {found['targets'][name]['bytes'] / 2**20:.1f} MiB"
    tried = {name: entry["parity"] for name, entry in found["targets"].items() if name not in found["artifacts"]}
    print_table({**rows, **_compared_rows(tried)})
    for name, entry in found["targets"].items():
        for note in entry["notes"]:
            print(f"note: {name}: {note}")


class Streamed:
    """Prints a text as it comes, with what it continues ahead of the first piece."""

    def __init__(self, prompt: str) -> None:
        self._before = prompt

    def __call__(self, piece: str) -> None:
        """Prints a piece."""
        print(self._before + piece, end="", flush=True)
        self._before = ""

    def end(self) -> None:
        """Ends the line; the prompt stands there though nothing came behind it."""
        print(self._before, flush=True)


def print_recipe(recipe: dict[str, Any]) -> None:
    """Prints what `qcompiler.api.describe_recipe` found."""
    print(f"{recipe['name']}: {'calibrated' if recipe['is_calibrated'] else 'needs no calibration'}")
    for number, item in enumerate(recipe["passes"], 1):
        options = ", ".join(f"{key}={value}" for key, value in item["options"].items())
        print(f"  {number}. {item['pass']}({options})\n     {item['summary']}")
    if recipe["scheme"] is not None:
        print(f"weight: {recipe['scheme']['weight']}\nactivation: {recipe['scheme']['activation']}")
    for format_ in recipe["caches"]:
        print(f"cache: {format_}")
    for target, support in recipe["targets"].items():
        print(f"{target}: {support['status']}" + (f" ({support['reason']})" if support["reason"] else ""))


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Prints what `qcompiler.api.describe_targets` found."""
    for target in targets:
        print(f"{target['name']}: {target['summary']}")
        for option in target["options"]:
            print(f"  {option['name']}={option['default']}  ({option['values']}) {option['help']}")
        missing = ", ".join(target["missing"])
        print(f"  missing here: pip install {' '.join(target['missing'])}" if missing else "  nothing is missing here")


def _compared_rows(compared: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Of targets that nothing is written of: how far they are from the native artifact."""
    return {
        f"compared: {name}": f"largest difference {parity['max_difference']:.1e}, at most {parity['tolerance']:.1e}"
        for name, parity in compared.items()
        if parity is not None
    }


def _held_out_row(found: dict[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {}
    return {f"KL to original, {found['tokens']} held-out tokens": f"{found['kl_divergence']:.4f} nats per token"}


def describe_engine(artifact: Any) -> dict[str, Any]:
    """Where kernels ran, and what for want of one did not."""
    report = artifact.report
    sites = Counter(site["implementation"] for site in report["sites"])
    found = {key: report[key] for key in ("device", "dtype", "fused_norms", "caches", "notes")}
    reasons = {site["site"]: site["reason"] for site in report["sites"] if site["implementation"] == "reference"}
    return {**found, "sites": dict(sites), "references": reasons}


def engine_in_short(engine: dict[str, Any]) -> str:
    """One line of `describe_engine`."""
    layers = ", ".join(f"{count} {implementation}" for implementation, count in engine["sites"].items())
    return f"kernels on {engine['device']} in {engine['dtype']}; layers: {layers}"
