"""The commands ``recommend`` and ``hardware``, and what ``compile --for`` takes from them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompiler import advice
from qcompiler.advisor import NONE, Advice, Hardware, Option, Taker, known_hardware
from qcompiler.cli.options import Json
from qcompiler.errors import InputError
from qcompiler.reporting import print_rows, print_table

__all__ = ["Batch", "Context", "For", "Goal", "choose_for", "hardware", "recommend"]

_SHOWN = 8  # options on the terminal

For = Annotated[
    str | None,
    typer.Option(
        "--for", help="A GPU (see `qcompiler hardware`); the recipe is what `qcompiler recommend` puts first."
    ),
]
Context = Annotated[int | None, typer.Option("--context", help="Tokens of each sequence; 4096 by default.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Sequences at once; 8 on servers, 1 elsewhere by default.")]
Goal = Annotated[str, typer.Option("--goal", help="quality, latency, throughput, memory or training.")]
More = Annotated[Path | None, typer.Option("--hardware", help="A TOML file of more hardware.")]


def recommend(
    model: Annotated[
        Path | None, typer.Argument(help="A Hugging Face directory; config.json alone will do. Or give the sizes.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="Such as h100 or rtx-4090 (see `qcompiler hardware`), or this: this machine, measured.")
    ] = advice.THIS,
    context: Context = None,
    batch: Batch = None,
    gpus: Annotated[int, typer.Option(help="That share the model, by tensor parallelism.")] = 1,
    goal: Goal = "quality",
    params: Annotated[str | None, typer.Option(help="Parameters in all, such as 70B.")] = None,
    layers: Annotated[int | None, typer.Option(help="Of the decoder.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Channels of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of queries.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Of keys and values.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Rows of the embedding.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Channels of the MLP, or of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="Of a mixture, in a layer.")] = None,
    active: Annotated[int | None, typer.Option(help="Experts that a token is sent to.")] = None,
    to: Annotated[list[str] | None, typer.Option(help="Only recipes that this target takes.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="Weigh only these, as `compile` takes them.")
    ] = None,
    hardware: More = None,
    everything: Annotated[bool, typer.Option("--all", help="List all recipes, and why each lost.")] = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Say which recipe suits a model on a GPU: memory, bounds of time, expected loss, who takes it, why others lost."""
    told = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    told |= {"vocab": vocab, "intermediate": intermediate, "experts": experts, "active": active}
    sizes: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    if params is not None:
        sizes["params"] = parse_count(params)
    found = advice.recommend(
        model,
        gpu,
        context=context,
        batch=batch,
        gpus=gpus,
        goal=goal,
        hardware=hardware,
        targets=to or (),
        recipes=recipe or (),
        **sizes,
    )
    if not as_json:
        _print(found, everything)
    return found.to_dict()


def hardware(
    name: Annotated[str | None, typer.Argument(help="Tell all of this one.")] = None,
    hardware: More = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine too: a copy and products, a second.")
    ] = True,
    as_json: Json = False,
) -> dict[str, Any]:
    """List what GPUs hold, read and multiply, with the source of the figures; this machine is measured."""
    known = known_hardware(hardware)
    if name is not None:
        items = [advice.hardware_named(name, known)]
    else:
        items = [*known.values(), *([advice.hardware_named(advice.THIS, known)] if measure else [])]
    if not as_json and name is not None:
        print_table({key: _text(value) for key, value in items[0].to_dict().items()})
    elif not as_json:
        _print_hardware(items)
    return {"hardware": [item.to_dict() for item in items]}


@dataclass(frozen=True)
class Chosen:
    """What ``compile`` is to do.

    Attributes:
        recipe: as ``--recipe`` takes it.
        targets: as ``--to`` takes them.
        fields: of the advice, for the summary; None without.
    """

    recipe: str
    targets: Sequence[str]
    fields: dict[str, Any] | None = None


def choose_for(
    click: typer.Context,
    model: Path,
    recipe: str | None,
    gpu: str | None,
    to: Sequence[str],
    *,
    context: int | None,
    batch: int | None,
    goal: str,
) -> Chosen:
    """The recipe that was named, or the first that suits a GPU; and targets in the form that fits that.

    Raises:
        InputError: as `qcompiler.advice.recommend`; and where nothing is to be quantized.
    """
    if gpu is None:
        if recipe is None:
            raise typer.BadParameter("name one, or a GPU with --for", ctx=click, param_hint="'--recipe' / '-r'")
        if context is not None or batch is not None:
            raise InputError("--context and --batch are of a GPU that is named", remedy="give --for GPU")
        return Chosen(recipe, to)
    recipes = () if recipe is None else (recipe,)
    found = advice.recommend(model, gpu, context=context, batch=batch, goal=goal, targets=to, recipes=recipes)
    if found.recipe == NONE:
        raise InputError(
            f"nothing is to be quantized for {found.question.hardware.name}, as is recommended",
            got="; ".join(found.notes[:2]),
            remedy="name a recipe with --recipe, or another --goal (quality, latency, throughput, memory)",
        )
    targets = advice.fit_targets(found, to)
    question, first = found.question, found.first
    print(
        f"for {question.hardware.name}: {found.recipe}"
        + (f" to {', '.join(targets)}" if targets else "")
        + f" (goal {question.goal}, {question.batch} x {question.context} tokens; weights "
        f"{first.footprint.weights / 1e9:.3g} GB, cache {first.footprint.cache / 1e9:.3g} GB; `qcompiler recommend` "
        "tells why)",
        file=sys.stderr,
    )
    kept = ("context", "batch", "goal", "notes")
    fields = {key: value for key, value in found.to_dict().items() if key in kept}
    return Chosen(found.recipe, targets, {"hardware": question.hardware.key, "recipe": found.recipe, **fields})


def parse_count(text: str) -> float:
    """A number such as ``70B``, ``135M`` or ``6.74e9``.

    Raises:
        InputError: for what is none.
    """
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    number, unit = text.strip().upper(), 1.0
    if number[-1:] in units:
        number, unit = number[:-1], units[number[-1]]
    try:
        return float(number) * unit
    except ValueError as error:
        raise InputError("not a number of parameters", got=text, expected="such as 70B, 135M or 6.74e9") from error


def _print(found: Advice, everything: bool) -> None:
    question, first, shape = found.question, found.first, found.question.shape
    print_table(
        {
            "model": f"{shape.name}: {shape.parameters / 1e9:.4g} billion parameters ({shape.source})",
            "on": f"{question.gpus} x {question.hardware.name}, {question.usable / 1e9:.1f} GB usable of each",
            "for": f"{question.goal}: {question.batch} x {question.context} tokens",
            "recommended": found.recipe,
            **_details(first),
            "command": found.command() or "none: serve the model as it is",
        }
    )
    reasons = found.reasons()
    shown = list(found.options) if everything else _distinct(found.options)[:_SHOWN]
    print_rows(("recipe", "weights", "cache", "context", "step", "prompts", "loss"), [*map(_row, shown)])
    print("GB on each GPU; the longest context; ms of a decoding step and s of the prompts, at least; nats per token")
    for option in shown[1:]:
        print(f"{option.candidate.name}: {reasons[option.candidate.name]}")
    if everything:
        for refusal in found.refused:
            print(f"{refusal.name}: {refusal.reason}")
    else:
        print(f"{len(found.options) - len(shown)} more are behind, {len(found.refused)} are out: --all tells why")
    for note in found.notes:
        print(f"note: {note}")


def _distinct(options: Sequence[Option]) -> list[Option]:
    """The first of each combination of formats."""
    found: dict[object, Option] = {}
    for option in options:
        one = option.candidate
        weight, activation = one.scheme.weight, one.scheme.activation
        formats = (weight and weight.dtype, activation and activation.dtype, one.keys and one.keys.bits)
        found.setdefault(formats, option)
    return list(found.values())


def _details(option: Option) -> dict[str, str]:
    sizes, decode = option.footprint, option.decode
    bound = "multiplying" if decode.is_compute_bound else "reading"
    return {
        "weights": f"{sum(option.parts.values()) / 1e9:.2f} GB with scales",
        "cache": f"{option.cache_per_token:,} bytes per token, {sizes.cache / 1e9:.2f} GB in all on each GPU",
        "activations": f"{sizes.activations / 1e9:.2f} GB; {option.left / 1e9:.1f} GB are left on each GPU",
        "GPUs needed": f"{option.gpus_needed}",
        "longest context": f"{option.longest_context:,} tokens; or {option.largest_batch} sequences at once",
        "decoding": f"{decode.seconds * 1e3:.2f} ms a step at least, of {bound}; "
        f"{option.tokens_per_second:,.0f} tokens/s at most, of {option.largest_batch} sequences",
        "prompts": "unknown" if option.prefill is None else f"{option.prefill:.3f} s at least, for all of a batch",
        "loss of weights": f"{_loss(option.weights.loss)}: {option.weights.source}",
        "loss of cache": f"{_loss(option.cache.loss)}: {option.cache.source}",
        "taken by": "; ".join(map(_taker, option.takers)) or "any engine",
    }


def _taker(taker: Taker) -> str:
    return f"{taker.engine} by {taker.text} (layers {taker.layers}, cache {taker.cache})"


def _loss(nats: float | None) -> str:
    return "unknown" if nats is None else f"{nats:.4f} nats per token"


def _row(option: Option) -> list[str]:
    return [
        option.candidate.name,
        f"{option.footprint.weights / 1e9:.2f}",
        f"{option.footprint.cache / 1e9:.2f}",
        f"{option.longest_context}",
        f"{option.decode.seconds * 1e3:.2f}",
        "unknown" if option.prefill is None else f"{option.prefill:.2f}",
        "unknown" if option.loss is None else f"{option.loss:.4f}",
    ]


def _print_hardware(items: Sequence[Hardware]) -> None:
    types = ("float8", "int8", "float4", "int4")
    rows = []
    for item in items:
        floats = item.float_type
        of_floats = _rate(item, floats) if floats in ("float16", "bfloat16") else f"{_rate(item, floats)} ({floats})"
        rates = [_rate(item, name) for name in types]
        rows.append([item.key, f"{item.memory / 1e9:.4g}", f"{item.bandwidth / 1e9:.4g}", of_floats, *rates])
    print_rows(("", "GB", "GB/s", "16 bits", *types), rows)
    print("dense rates in 10^12 operations a second; names and sources: qcompiler hardware NAME")


def _rate(item: Hardware, name: str) -> str:
    rate = item.rate(name)
    return f"{rate / 1e12:.5g}" if rate is not None else "unknown" if name in item.types else "-"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {amount:.5g}" for key, amount in value.items()) or "unknown"
    return ", ".join(value) if isinstance(value, list) else str(value)
