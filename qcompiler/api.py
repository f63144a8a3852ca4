"""The public functions: capture, compile, lower, load, evaluate, generate.

With `qcompiler.cli`, the only module that sees every room; `qcompiler.to_target` sees the targets.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qcompiler.artifacts import (
    MANIFEST,
    CompileResult,
    Evaluation,
    Generation,
    HFArtifact,
    load,
    load_held_out,
    load_tokenizer,
    native_directory,
)
from qcompiler.artifacts import evaluate as evaluate_artifact
from qcompiler.artifacts import generate as generate_text
from qcompiler.errors import InputError, TargetError
from qcompiler.frontend import (
    canonicalize,
    capture_checkpoint,
    capture_module,
    is_quantized_checkpoint,
    refuse_quantized,
)
from qcompiler.ir import Graph
from qcompiler.lowering import targets as known_targets
from qcompiler.numerics import Scheme
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipe_file import load_recipe, override_schemes
from qcompiler.passes.recipes import RECIPES
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.protocol import Artifact, Pass, Pipeline, Target, choose_device
from qcompiler.reporting import CompileReport
from qcompiler.storage import no_directory
from qcompiler.sweep import CalibrationInput, Progress, check_work_dir, compile_graph, contention
from qcompiler.to_target import (
    check_target,
    describe_targets,
    lower,
    make_target,
    open_with_engine,
    record_target,
    try_target,
    write_target,
)

__all__ = [
    "CompileResult",
    "capture",
    "check_arguments",
    "check_target",
    "compile",
    "describe_recipe",
    "describe_targets",
    "evaluate",
    "generate",
    "load",
    "lower",
    "make_target",
    "open_artifact",
    "recipe_matrix",
    "record_target",
    "try_target",
    "write_target",
]

Recipe = str | Path | Sequence[Pass]
_WIDTH = 4096  # of an ordinary layer
_LONG = 10.0  # seconds; less than that nobody asks about


def capture(
    model: str | Path | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Turns a model into a canonical graph; weights of a directory stay on disk.

    Args:
        model: a Hugging Face directory, an ONNX file (or a directory of one), a transformers model, or any module with
            ``example_inputs``. Of what is quantized already (compressed-tensors, GPTQ, AWQ, GGUF, ONNX), sites have the
            codes that its files hold.
        example_inputs: positional tensors for a plain module.
        dynamic_shapes: for a plain module, as `torch.export.export` takes them.
        trust_remote_code: run modelling code a directory brings along.

    Raises:
        InputError, WeightError, UnsupportedModelError: see `qcompiler.frontend.capture`.
    """
    if not isinstance(model, nn.Module):
        return capture_checkpoint(model, trust_remote_code=trust_remote_code)
    return canonicalize(capture_module(model, example_inputs, dynamic_shapes=dynamic_shapes))


def compile(
    model: str | Path | nn.Module | Graph,
    recipe: Recipe,
    calibration: CalibrationInput = None,
    *,
    targets: str | Target | Sequence[str | Target] = (),
    overrides: Mapping[str, str | None] | None = None,
    memory_budget: int | None = None,
    device: str = "auto",
    seed: int = 0,
    strict: bool = False,
    work_dir: str | Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> CompileResult:
    """Quantizes a model in one streamed sweep per stage.

    Args:
        model: what `capture` takes, or a graph it returned, which is left as it is.
        recipe: a name (`qcompiler.passes.recipes`), a ``.toml`` file, the place of somebody else's passes
            (``package.module:NAME`` or ``file.py:NAME``, which is imported and so runs), or passes in order.
        calibration: text, tokens, self-generated, or inputs (also as plain tuples). Without it, a
            recipe that needs calibration lets the model generate its own tokens, and says so.
        targets: where the result is meant to go, as `make_target` takes and gives them; operators and schemes they
            refuse are errors before anything is computed.
        overrides: glob pattern of sites → scheme or None, put behind those of the recipe's `Assign`: the last match
            wins.
        memory_budget: bytes of calibration values held in memory, more goes to disk; by default a quarter of the
            machine's.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: the only source of randomness.
        strict: a site that is left alone without being asked for is an error; so is what would be lost of the source
            (tensors without a place in the graph, files that are not copied).
        work_dir: where finished segments and spilled values go; a temporary directory by default.
        progress: called with segments done, segments in all (0 in phases whose length nobody knows), and what is being
            done.
        trust_remote_code: run modelling code a directory brings along.

    Raises:
        QCompilerError: see `qcompiler.errors`; nothing is left behind. Arguments are checked before any work, and what
            a target cannot take is found on the graph, before calibration.
    """
    targets = (targets,) if isinstance(targets, (str, Target)) else targets
    passes = check_arguments(
        model,
        recipe,
        overrides=overrides,
        memory_budget=memory_budget,
        device=device,
        seed=seed,
        work_dir=work_dir,
    )
    made_targets = [make_target(target) for target in targets]
    report = CompileReport()
    with report.timed("total"):
        if progress is not None:
            progress(0, 0, "capture")
        with report.timed("capture"):
            graph = model.copy() if isinstance(model, Graph) else capture(model, trust_remote_code=trust_remote_code)
        result = compile_graph(
            graph,
            Pipeline(passes),
            calibration,
            report=report,
            targets=made_targets,
            memory_budget=memory_budget,
            device=choose_device(device),
            seed=seed,
            strict=strict,
            work_dir=work_dir,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    if report.seconds["total"] > _LONG and (note := contention()) is not None:
        report.notes.append(note)
    return result


def check_arguments(
    model: str | Path | nn.Module | Graph,
    recipe: Recipe,
    *,
    overrides: Mapping[str, str | None] | None = None,
    memory_budget: int | None = None,
    device: str = "auto",
    seed: int = 0,
    work_dir: str | Path | None = None,
) -> tuple[Pass, ...]:
    """Whatever can be said against the arguments of `compile` before any work: that reads headers and writes nothing.

    Returns:
        The passes of the recipe, with the overrides, which are a recipe too: a file is not run again for them.

    Raises:
        QCompilerError: the first thing that is wrong.
    """
    _check_seed(seed)
    if memory_budget is not None and memory_budget < 0:
        raise InputError("the memory budget is negative", got=memory_budget, expected="bytes")
    pipeline = Pipeline(override_schemes(load_recipe(recipe), overrides))
    choose_device(device)
    check_work_dir(work_dir)
    if not isinstance(model, nn.Module):
        refuse_quantized(model)
    return pipeline.passes


def _check_seed(seed: int) -> None:
    if not -(1 << 63) <= seed < 1 << 63:
        raise InputError("the seed is too large", got=seed, expected="a number of 64 bits")


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """What a recipe consists of, as plain JSON values.

    Returns:
        ``name``, ``is_calibrated``; ``passes``: ``pass`` (the class), ``summary`` (a line) and ``options`` (those that
        are not the defaults); ``scheme``: what its `Assign` gives to a layer, ``weight`` and ``activation`` as text,
        None without one; ``caches``: formats; ``targets``: ``status`` and ``reason`` of layers of ordinary width.

    Raises:
        RecipeError: for an unknown one.
    """
    passes = Pipeline(load_recipe(recipe)).passes
    assigned = [Scheme.parse(item.scheme) for item in passes if isinstance(item, Assign) and item.scheme]
    targets = {name: [spec.supports(scheme, _WIDTH) for scheme in assigned] for name, spec in _matrix_targets().items()}
    return {
        "name": str(recipe) if isinstance(recipe, (str, Path)) else ", ".join(type(item).__name__ for item in passes),
        "is_calibrated": any(item.is_calibrated for item in passes),
        "passes": [
            {
                "pass": type(item).__name__,
                "summary": (inspect.getdoc(type(item)) or "").partition("\n")[0],
                "options": _changed_options(item),
            }
            for item in passes
        ],
        "scheme": {"weight": str(assigned[0].weight or "float"), "activation": str(assigned[0].activation or "float")}
        if assigned
        else None,
        "caches": [str(found) for item in passes for found in item.cache_formats()],
        "targets": {
            name: {"status": found[0].status, "reason": found[0].reason} for name, found in targets.items() if found
        },
    }


def _changed_options(item: Pass) -> dict[str, Any]:
    """The options of a pass that are not its defaults."""
    fields = {field.name: field for field in dataclasses.fields(item)}
    return {
        name: value
        for name, value in item.options().items()
        if fields[name].default is dataclasses.MISSING or getattr(item, name) != fields[name].default
        if not (fields[name].default_factory is not dataclasses.MISSING and not value)
    }


def _matrix_targets() -> dict[str, Target]:
    return {name: target for cls in known_targets() for name, target in cls.variants().items()}


def recipe_matrix() -> dict[str, dict[str, str]]:
    """Recipe × target: ``fused``, ``runs``, ``writes-only`` or ``refused``, for layers of ordinary width."""
    specs = _matrix_targets()
    matrix: dict[str, dict[str, str]] = {}
    for name in RECIPES:
        passes = Pipeline(named_recipe(name)).passes
        schemes = [Scheme.parse(item.scheme) for item in passes if isinstance(item, Assign) and item.scheme]
        matrix[name] = {"native": "runs"}
        for target, spec in specs.items():
            matrix[name][target] = ", ".join(spec.supports(scheme, _WIDTH).status for scheme in schemes)
    return matrix


def open_artifact(
    path: str | Path,
    *,
    exact: bool = True,
    engine: str | None = None,
    device: str | None = None,
    streamed: bool | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Anything that runs: ``OUT``, ``OUT/native``, ``OUT/onnx``, or a Hugging Face directory.

    Args:
        path: the directory. A quantized checkpoint that `capture` reads is run as a native artifact is.
        exact: compute as written; False allows an engine's faster ways (ONNX Runtime's 8-bit activations).
        engine: ``kernels`` runs a native artifact by fused low-bit operators; by default, its reference arithmetic.
        device: ``cpu``, ``cuda`` or ``auto``; by default ``auto`` for kernels, and the CPU for everything else.
        streamed: run a native artifact segment by segment, see `CompileResult.artifact`; by default, if it is large.
        trust_remote_code: for a Hugging Face directory, run the code it brings along.

    Raises:
        InputError: if the path is none of these, or does not run on this device or segment by segment.
        TargetError: for an unknown engine, or one that does not run what is there.
    """
    root = Path(path).parent if Path(path).name == "model.onnx" else Path(path)
    if not root.is_dir() and root.suffix != ".gguf":
        raise no_directory(root)
    is_native = (native_directory(root) / MANIFEST).is_file() or is_quantized_checkpoint(root)
    if streamed and (engine is not None or not is_native):
        raise InputError("this is not run segment by segment", where=root, expected="a native artifact, without engine")
    if is_native:
        result = load(root, trust_remote_code=trust_remote_code)
        if engine is not None:
            return open_with_engine(result, engine, device or "auto")
        return result.artifact(choose_device(device or "cpu"), streamed=streamed)
    if engine is not None:
        raise TargetError(f"{engine} run native artifacts alone", where=root, remedy="give OUT or OUT/native")
    for target in known_targets():
        if target.main_file is not None and (root / target.main_file).is_file():
            return target.open(root, exact=exact, device=device or "cpu")
    if (root / "config.json").is_file():
        return HFArtifact(root, trust_remote_code=trust_remote_code, device=choose_device(device or "cpu"))
    raise InputError(
        "nothing here can be run",
        where=root,
        got=", ".join(sorted(entry.name for entry in root.iterdir())[:6]) or "an empty directory",
        expected="manifest.json (native), model.onnx, or config.json (Hugging Face)",
    )


def evaluate(
    artifact: str | Path | Artifact | CompileResult,
    *,
    text: str | Path | Iterable[str] | None = None,
    tokens: Tensor | None = None,
    against: str | Path | Artifact | None = None,
    cached: bool | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity, and KL divergence to the original; see `qcompiler.artifacts.evaluation`.

    Without text or tokens, the tokens are those the native artifact keeps from its calibration.

    Raises:
        InputError: without text, for an artifact that keeps no tokens; see also `qcompiler.artifacts.evaluation`.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError("max_tokens must be positive", got=max_tokens, expected="1 or more")
    opened = _open(artifact)
    if text is None and tokens is None:
        tokens = artifact.held_out if isinstance(artifact, CompileResult) else _held_out(opened.path)
        if tokens is None:
            raise InputError(
                "there is no text to evaluate with, and this artifact keeps none",
                where=opened.path,
                expected="a text, or an artifact that was calibrated",
                remedy="give --text FILE",
            )
    return evaluate_artifact(
        opened,
        text=text,
        tokens=tokens,
        against=None if against is None else _open(against),
        cached=cached,
        max_tokens=max_tokens,
        progress=progress,
    )


def _held_out(path: Path | None) -> Tensor | None:
    """The tokens of a native artifact, or of the one that a lowered model lies beside."""
    if path is None:
        return None
    found = load_held_out(path)
    return found if found is not None else load_held_out(path.parent / "native")


def generate(
    artifact: str | Path | Artifact | CompileResult, prompt: str, *, trust_remote_code: bool = False, **options: Any
) -> Generation:
    """Continues a prompt; options as in `qcompiler.artifacts`. ``trust_remote_code``: a tokenizer may be code, too."""
    _check_seed(options.get("seed", 0))
    opened = _open(artifact, exact=False)
    if opened.path is None:
        raise InputError(
            "this artifact has no tokenizer beside it", remedy="save it, and copy the tokenizer's files beside it"
        )
    tokenizer = load_tokenizer(opened.path, trust_remote_code=trust_remote_code)
    return generate_text(opened, tokenizer, prompt, **options)


def _open(artifact: str | Path | Artifact | CompileResult, *, exact: bool = True) -> Artifact:
    if isinstance(artifact, CompileResult):
        return artifact.artifact()
    if isinstance(artifact, (str, Path)):
        return open_artifact(artifact, exact=exact)
    return artifact
