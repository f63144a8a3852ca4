"""Draws KL divergence against bits per weight: ``python -m benchmarks.plot quality.json --output FILE.svg``.

Reads what ``python -m benchmarks.quality --json`` keeps. A point is a recipe, the mean over its seeds and texts; how
its activations are rounded is told by the marker. Needs matplotlib.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Point", "draw", "points"]

_MARKERS = {"float": "o", "8 bits": "s", "4 bits": "^"}


@dataclass(frozen=True)
class Point:
    """One recipe.

    Attributes:
        recipe: its name.
        bits: per weight, of the quantized layers.
        divergence: KL to the original, nats per token.
        activations: how they are rounded: ``float``, ``8 bits`` or ``4 bits``.
    """

    recipe: str
    bits: float
    divergence: float
    activations: str


def points(runs: Iterable[Mapping[str, Any]], model: str) -> list[Point]:
    """The recipes that quantize weights, of one model, best first."""
    of_recipe: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["model"] == model and "error" not in run and run["bits_per_weight"] is not None:
            of_recipe.setdefault(run["recipe"], []).append(run)
    found = []
    for recipe, members in of_recipe.items():
        values = [text["kl_divergence"] for run in members for text in run["texts"].values()]
        found.append(Point(recipe, members[0]["bits_per_weight"], statistics.fmean(values), _activations(recipe)))
    return sorted(found, key=lambda point: point.divergence)


def _activations(recipe: str) -> str:
    from qcompiler.numerics import Scheme
    from qcompiler.passes import Assign
    from qcompiler.passes.recipe_file import load_recipe

    schemes = [Scheme.parse(item.scheme) for item in load_recipe(recipe) if isinstance(item, Assign) and item.scheme]
    rounded = [scheme.activation for scheme in schemes if scheme.activation is not None]
    return "float" if not rounded else f"{rounded[0].bits} bits"


def draw(found: list[Point], path: Path, title: str) -> None:
    """Writes the picture, in the format of the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "qcompiler"  # the same points give the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for activations, marker in _MARKERS.items():
        members = [point for point in found if point.activations == activations]
        if members:
            xs, ys = [point.bits for point in members], [point.divergence for point in members]
            axes.plot(xs, ys, marker, label=f"activations: {activations}")
    for point, place in zip(found, _places(found), strict=True):
        axes.annotate(
            point.recipe, (point.bits, point.divergence), xytext=place, textcoords="offset points", fontsize=8
        )
    axes.set(yscale="log", xlabel="bits per weight of quantized layers, scales and tables included", title=title)
    axes.set_ylabel("KL divergence to the original, nats per token")
    axes.margins(x=0.24)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _places(found: list[Point]) -> list[tuple[int, int]]:
    """Where labels stand, in typographic points from theirs: right, left where a neighbour's is near, else above it."""
    right, above = (7, -3), (7, 5)
    places: list[tuple[int, int]] = []
    for index, point in enumerate(found):
        left = (-6 - 5 * len(point.recipe), -3)
        taken = {
            places[other][0] > 0
            for other in range(index)
            if abs(found[other].bits - point.bits) < 0.6 and point.divergence / found[other].divergence < 1.18
        }
        places.append(right if True not in taken else left if False not in taken else above)
    return places


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="what benchmarks.quality --json wrote")
    parser.add_argument("--output", type=Path, required=True, help="the picture: .svg, .png or .pdf")
    parser.add_argument("--model", help="as in the file; by default the first")
    options = parser.parse_args()
    document = json.loads(options.runs.read_text(encoding="utf-8"))
    model = options.model or document["runs"][0]["model"]
    found = points(document["runs"], model)
    if not found:
        raise SystemExit(f"{options.runs} holds no recipe that quantizes weights, of {model}")
    texts = ", ".join(dict.fromkeys(text for run in document["runs"] for text in run.get("texts", ())))
    draw(found, options.output, f"{model} on {texts}")


if __name__ == "__main__":
    main()
