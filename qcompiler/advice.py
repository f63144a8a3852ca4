"""`recommend`: hands the advisor the recipes and the targets that come along.

With `qcompiler.api`, `qcompiler.to_target` and `qcompiler.cli`, a module that sees passes and targets.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qcompiler.advisor import (
    NONE,
    Advice,
    Candidate,
    Hardware,
    Offer,
    advise,
    find_hardware,
    known_hardware,
    measure_machine,
    read_shape,
    told_shape,
)
from qcompiler.errors import InputError
from qcompiler.frontend import import_with_onnx
from qcompiler.lowering import targets as known_targets
from qcompiler.numerics import Scheme
from qcompiler.passes import Assign, SqueezeLLM
from qcompiler.passes.recipe_file import load_recipe
from qcompiler.passes.recipes import CACHES, RECIPES
from qcompiler.protocol import Pipeline
from qcompiler.to_target import make_target

__all__ = ["THIS", "fit_targets", "hardware_named", "recommend"]

THIS = "this"
"""Asks for the machine this runs on, measured."""
_ENGINES = {
    "checkpoint": "vLLM",
    "onnx": "ONNX Runtime",
    "ort": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "kernels": "qcompiler",
}
"""Whose answers `Target.supports` gives, by the target."""
_SERVING_LAYOUT = "compressed-tensors"  # the first of checkpoints: it holds most formats


def recommend(
    model: str | Path | None = None,
    gpu: str | Hardware = THIS,
    *,
    context: int | None = None,
    batch: int | None = None,
    gpus: int = 1,
    goal: str = "quality",
    hardware: str | Path | None = None,
    targets: Sequence[str] = (),
    recipes: Sequence[str] = (),
    **sizes: Any,
) -> Advice:
    """What to do with a model on a GPU: recipes in order, with numbers and reasons. No weight is read.

    Args:
        model: a Hugging Face directory, with weights or with ``config.json`` alone; None: ``sizes`` are told.
        gpu: a name (`qcompiler hardware` lists them), ``this`` for the machine at hand, which is measured, or hardware.
        context: tokens of each sequence; by default 4096, or what the model takes where that is less.
        batch: sequences at once; by default 8 on servers and 1 elsewhere.
        gpus: that share the model, by tensor parallelism.
        goal: ``quality`` (no loss that evaluations tell from the original; the fastest of these), ``latency``,
            ``throughput``, ``memory``, or ``training``.
        hardware: a TOML file of more hardware.
        targets: as ``--to`` takes them; recipes that one of them does not take are out. Without them, all that run on
            this hardware are asked.
        recipes: as ``--recipe`` takes them; only these are weighed. By default all that have a name, with and without
            a cache, and to leave the model as it is.
        **sizes: instead of a directory: ``params``, ``layers``, ``hidden``, ``heads``, ``kv_heads``, ``head_dim``,
            ``vocab``, ``intermediate``, ``experts``, ``active``, ``positions``, ``tied`` (`told_shape`).

    Raises:
        InputError: for unknown hardware (the nearest names are offered), missing or absurd sizes, and where nothing
            fits: by how much, and what would.
    """
    if (model is None) == (not sizes):
        raise InputError(
            "either a model directory or its sizes",
            got="neither" if model is None else f"{model} and {', '.join(sizes)}",
            expected="MODEL, or --layers, --hidden, --kv-heads, --head-dim and --params",
        )
    known = known_hardware(None if hardware is None else Path(hardware))
    found = gpu if isinstance(gpu, Hardware) else hardware_named(gpu, known)
    shape = told_shape(**sizes) if model is None else read_shape(Path(model))
    groups = [_expanded(text, found) for text in targets] or [_offers(found)]
    candidates = [_candidate(name) for name in recipes] or list(_candidates())
    for offers in groups:
        advice = advise(
            shape,
            found,
            candidates,
            offers,
            context=context,
            batch=batch,
            gpus=gpus,
            goal=goal,
            known=known,
            model="MODEL" if model is None else str(model),
        )
        taken = {option.candidate.name for option in advice.options}
        candidates = [candidate for candidate in candidates if candidate.name in taken]
    return advice


def hardware_named(name: str, known: dict[str, Hardware] | None = None) -> Hardware:
    """Hardware by its name; ``this`` is measured, which takes about a second.

    Raises:
        InputError: for an unknown one.
    """
    return measure_machine() if name.lower() == THIS else find_hardware(name, known or known_hardware())


def fit_targets(advice: Advice, texts: Sequence[str]) -> list[str]:
    """Targets in the form that fits an advice: with the compute capability and the layout that their texts leave open.

    Raises:
        InputError: for a target that does not take what was recommended.
    """
    question, found = advice.question, []
    for text in texts:
        weighed = advise(
            question.shape,
            question.hardware,
            [advice.first.candidate],
            _expanded(text, question.hardware),
            context=question.context,
            batch=question.batch,
            gpus=question.gpus,
            goal=question.goal,
        )
        takers = weighed.first.takers
        found.append(takers[0].text if takers else text)
    return found


@cache
def _candidates() -> tuple[Candidate, ...]:
    """All named recipes, with each cache and without, and to leave the model as it is."""
    names = [NONE, *CACHES]
    names += [f"{name}{suffix}" for name in RECIPES for suffix in ("", *(f"+{cache}" for cache in CACHES))]
    return tuple(_candidate(name) for name in names)


def _candidate(name: str) -> Candidate:
    passes = () if name == NONE else Pipeline(load_recipe(name)).passes
    schemes = [Scheme.parse(item.scheme) for item in passes if isinstance(item, Assign) and item.scheme]
    caches = [spec for item in passes for spec in item.cache_formats()]
    return Candidate(
        name,
        schemes[0] if schemes else Scheme(),
        keys=caches[0] if caches else None,
        values=caches[-1] if caches else None,
        passes=tuple(type(item).__name__ for item in passes),
        kept_apart=sum(item.sparse_fraction for item in passes if isinstance(item, SqueezeLLM)),
    )


def _offers(hardware: Hardware) -> list[Offer]:
    """The targets that run on hardware, those first that are preferred where several do."""
    if hardware.kind == "cpu":
        others = [target.name for target in known_targets() if target.name not in ("checkpoint", "kernels", "tensorrt")]
        return [_offer(text, hardware) for text in (*others, "checkpoint:format=gguf", "kernels:device=cpu")]
    found = _expanded("checkpoint", hardware)
    if hardware.vendor == "nvidia":
        if hardware.capability in _built_for():
            found += _expanded("tensorrt", hardware)
        found += _expanded("kernels", hardware)
    return found


def _expanded(text: str, hardware: Hardware) -> list[Offer]:
    """A target in the forms that its text leaves open: layouts of checkpoints, the compute capability of TensorRT."""
    made, (name, _, options) = make_target(text), text.partition(":")
    given = {item.partition("=")[0] for item in options.split(",")} - {""}
    join = ":" if not options else ","
    if made.name == "checkpoint" and not any("format".startswith(option) for option in given):
        layouts = [layout for layout in get_args(get_type_hints(type(made))["format"]) if layout != _SERVING_LAYOUT]
        return [_offer(each, hardware) for each in (text, *(f"{text}{join}format={layout}" for layout in layouts))]
    if made.name == "tensorrt" and hardware.capability is not None and "sm" not in given:
        text = f"{text}{join}sm={hardware.capability}"
    if made.name == "kernels" and not given:
        made = make_target(name, device="cpu" if hardware.kind == "cpu" else "cuda")
        return [Offer(text, made, _ENGINES["kernels"], serves=hardware.kind == "cpu")]
    return [_offer(text, hardware)]


def _offer(text: str, hardware: Hardware) -> Offer:
    """Engines that read checkpoints serve, but for llama.cpp; on a CPU, where one person is served, all do."""
    made = make_target(text)
    is_gguf = getattr(made, "format", None) == "gguf"
    engine = "llama.cpp" if is_gguf else _ENGINES.get(made.name, made.name)
    return Offer(text, made, engine, serves=hardware.kind == "cpu" or (made.name == "checkpoint" and not is_gguf))


def _built_for() -> tuple[int, ...]:
    """Compute capabilities that TensorRT's builder knows; none where what writes its files is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnx_ir")):
        return ()
    found: tuple[int, ...] = import_with_onnx("qcompiler.lowering.tensorrt.legality").CAPABILITIES
    return found
