"""The public functions: capture, compile, lower, load, evaluate, generate.

With `qcompiler.cli`, the only module that sees every room.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from qcompiler.artifact import Artifact
from qcompiler.canonicalize import canonicalize
from qcompiler.capture import capture_directory, capture_module
from qcompiler.compiling import CalibrationInput, CompileResult, choose_device, compile_graph
from qcompiler.errors import InputError, TargetError
from qcompiler.evaluate import Evaluation
from qcompiler.evaluate import evaluate as evaluate_artifact
from qcompiler.generate import Generation
from qcompiler.generate import generate as generate_text
from qcompiler.graph import Graph
from qcompiler.hf import HFArtifact, load_tokenizer
from qcompiler.native import MANIFEST, NativeArtifact, load_held_out, load_native
from qcompiler.parity import check_parity
from qcompiler.pass_base import Pass
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipe_file import load_recipe, override_schemes
from qcompiler.passes.recipes import RECIPES
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.pipeline import Pipeline
from qcompiler.report import CompileReport
from qcompiler.spec import Scheme
from qcompiler.sweep import Progress
from qcompiler.target import TargetSpec

if TYPE_CHECKING:
    from qcompiler.lowering.kernels.model import KernelModel

__all__ = [
    "CompileResult",
    "capture",
    "compile",
    "evaluate",
    "generate",
    "load",
    "lower",
    "open_artifact",
    "recipe_matrix",
    "target_spec",
]

Recipe = str | Path | Sequence[Pass]
_TARGETS = ("onnx", "kernels")
_NOISE_SAMPLES = 3
_FLOAT16_TOKENS = 16  # evaluated operator by operator, which is slow


def capture(
    model: str | Path | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Turns a model into a canonical graph; weights of a directory stay on disk.

    Args:
        model: a Hugging Face directory, a transformers model, or any module with ``example_inputs``.
        example_inputs: positional tensors for a plain module.
        dynamic_shapes: for a plain module, as `torch.export.export` takes them.
        trust_remote_code: run modelling code a directory brings along.

    Raises:
        InputError, WeightError, UnsupportedModelError: see `qcompiler.capture`.
    """
    if isinstance(model, nn.Module):
        graph = capture_module(model, example_inputs, dynamic_shapes=dynamic_shapes)
    else:
        graph = capture_directory(model, trust_remote_code=trust_remote_code)
        graph.provenance["companions"] = str(model)
    return canonicalize(graph)


def compile(
    model: str | Path | nn.Module | Graph,
    recipe: Recipe,
    calibration: CalibrationInput = None,
    *,
    targets: Sequence[str | TargetSpec] = (),
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
        model: what `capture` takes, or a graph it returned; a graph is rewritten in place.
        recipe: a name (`qcompiler.passes.recipes`), a ``.toml`` file, the place of somebody else's passes
            (``package.module:NAME`` or ``file.py:NAME``, which is imported and so runs), or passes in order.
        calibration: text, tokens or self-generated; for a plain module, an iterable of input tuples. Without it, a
            recipe that needs calibration lets the model generate its own tokens, and says so.
        targets: where the result is meant to go, by name or as `target_spec` gives them; schemes they refuse are errors
            before anything is computed.
        overrides: glob pattern of sites → scheme or None, put behind those of the recipe's `Assign`: the last match
            wins.
        memory_budget: bytes of calibration values held in memory, more goes to disk; by default a quarter of the
            machine's.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: the only source of randomness.
        strict: a site that is left alone without being asked for is an error.
        work_dir: where finished segments and spilled values go; a temporary directory by default.
        progress: called with segments done, segments in all, and what is being done.
        trust_remote_code: run modelling code a directory brings along.

    Raises:
        QCompilerError: see `qcompiler.errors`; nothing is left behind.
    """
    _check_seed(seed)
    pipeline = Pipeline(override_schemes(load_recipe(recipe), overrides))
    place = choose_device(device)
    specs = [target_spec(target) if isinstance(target, str) else target for target in targets]
    report = CompileReport()
    with report.timed("total"):
        with report.timed("capture"):
            graph = model if isinstance(model, Graph) else capture(model, trust_remote_code=trust_remote_code)
        return compile_graph(
            graph,
            pipeline,
            calibration,
            report=report,
            targets=specs,
            memory_budget=memory_budget,
            device=place,
            seed=seed,
            strict=strict,
            work_dir=work_dir,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )


def _check_seed(seed: int) -> None:
    if not -(1 << 63) <= seed < 1 << 63:
        raise InputError("the seed is too large", got=seed, expected="a number of 64 bits")


def load(directory: str | Path) -> CompileResult:
    """Reads a native artifact: ``OUT`` or ``OUT/native``. Weights stay on disk until they are used.

    Raises:
        ArtifactError: if there is none, or it is damaged.
    """
    root = _native_directory(Path(directory))
    graph, manifest, report = load_native(root)
    manifest.pop("schema")
    return CompileResult(graph, CompileReport.from_dict(report), manifest, load_held_out(root))


def _native_directory(path: Path) -> Path:
    return path / "native" if (path / "native" / MANIFEST).is_file() else path


def target_spec(name: str, *, opset: int | None = None) -> TargetSpec:
    """The target of a name such as ``onnx``.

    Args:
        name: the target.
        opset: for ``onnx``, the operator set; by default the one that `lower` takes.

    Raises:
        TargetError: for an unknown one, or an operator set that cannot be written.
    """
    if name == "onnx":
        from qcompiler.lowering.onnx import OnnxTarget

        return OnnxTarget() if opset is None else OnnxTarget(opset)
    if name == "kernels":
        from qcompiler.lowering.kernels.target import KernelsTarget

        return KernelsTarget("cuda" if torch.cuda.is_available() else "cpu")
    raise TargetError("unknown target", got=name, expected=", ".join(_TARGETS))


def recipe_matrix() -> dict[str, dict[str, str]]:
    """Recipe × target: ``fused``, ``runs``, ``writes-only`` or ``refused``, for layers of ordinary width."""
    from qcompiler.lowering.kernels.target import KernelsTarget

    specs: dict[str, TargetSpec] = {"onnx": target_spec("onnx")}
    specs |= {"kernels (CUDA)": KernelsTarget("cuda"), "kernels (CPU)": KernelsTarget("cpu")}
    matrix: dict[str, dict[str, str]] = {}
    for name in RECIPES:
        passes = Pipeline(named_recipe(name)).passes
        schemes = [Scheme.parse(item.scheme) for item in passes if isinstance(item, Assign) and item.scheme]
        matrix[name] = {"native": "runs"}
        for target, spec in specs.items():
            matrix[name][target] = ", ".join(spec.supports(scheme, 4096).status for scheme in schemes)
    return matrix


@overload
def lower(
    result: CompileResult | str | Path,
    target: Literal["kernels"],
    directory: None = None,
    *,
    verify: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    tune: bool = False,
) -> "KernelModel": ...


@overload
def lower(
    result: CompileResult | str | Path, target: str, directory: str | Path, *, verify: bool = True, **options: Any
) -> dict[str, Any]: ...


def lower(
    result: CompileResult | str | Path,
    target: str,
    directory: str | Path | None = None,
    *,
    verify: bool = True,
    **options: Any,
) -> Any:
    """Lowers a compiled model to a target, and compares what came out with the native artifact.

    Args:
        result: a compiled model, or the directory of a native artifact.
        target: ``onnx``, which is written and loaded again; or ``kernels``, which is a module in memory.
        directory: for ``onnx``, a new or empty one.
        verify: run both on a few tokens, and put the difference in the report.
        options: of the target: for ``onnx``, ``opset`` and ``float_dtype``; for ``kernels``, ``device`` (``cpu``,
            ``cuda`` or ``auto``), ``dtype`` (of activations) and ``tune`` (search for launch configurations).

    Returns:
        For ``onnx``, the target's report, with ``parity`` where it was verified. For ``kernels``, the model
        (`qcompiler.lowering.kernels.KernelModel`), which has such a report.

    Raises:
        TargetError: for an unknown target or option, something the target does not take, or a directory that is
            missing or one too many.
        VerificationError: if what came out computes something else.
    """
    target_spec(target)
    if (directory is None) is (target != "kernels"):
        raise TargetError(
            "this target is written to a directory" if directory is None else "this target is not written anywhere",
            where=target,
            got="no directory" if directory is None else directory,
            expected="a new or empty directory" if directory is None else "no directory: a model in memory comes back",
        )
    if not isinstance(result, CompileResult):
        result = load(result)
    try:
        if directory is None:
            return _lower_to_kernels(result, verify=verify, **options)
        return _lower_to_onnx(result, directory, verify=verify, **options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise TargetError("unknown option of a target", where=target, got=error) from error


def _lower_to_onnx(result: CompileResult, directory: str | Path, *, verify: bool, **options: Any) -> dict[str, Any]:
    from qcompiler.lowering import onnx

    written = onnx.lower(result.graph, directory, companions=result.graph.provenance.get("companions"), **options)
    if verify and result.graph.signature.index_of_output("logits") is not None:
        tolerance = 2e-2 if options.get("float_dtype") == "float16" else 1e-3
        try:
            written["parity"] = check_parity(
                result.artifact(),
                onnx.OnnxArtifact(Path(directory), accuracy_level=1),
                tolerance=tolerance,
                unrounded=(unrounded := _unrounded(result)),
                noisy=() if unrounded is None else _noisy(result.graph, None, torch.float32),
            )
            if options.get("float_dtype") == "float16":
                written["float16_parity"] = _check_float16(result, directory, tolerance)
        except BaseException:  # what was not verified must not look as if it had been
            shutil.rmtree(directory, ignore_errors=True)
            raise
    result.report.targets["onnx"] = written
    return written


def _check_float16(result: CompileResult, directory: str | Path, tolerance: float) -> dict[str, Any]:
    """The same comparison in true float16, which ONNX Runtime does not compute in on a CPU; a few tokens."""
    from qcompiler.lowering.onnx.reference import Float16Artifact

    evaluated = Float16Artifact(directory)
    if result.held_out is not None:
        evaluated.forward(result.held_out[:1, :_FLOAT16_TOKENS])  # refuses what overflows on real text
    unrounded = _unrounded(result)
    return check_parity(
        result.artifact(), evaluated, tolerance=tolerance, unrounded=unrounded, rows=1, length=_FLOAT16_TOKENS
    )


def _lower_to_kernels(
    result: CompileResult, *, verify: bool, device: str = "auto", dtype: str | None = None, tune: bool = False
) -> "KernelModel":
    from qcompiler.lowering.kernels.model import lower as lower_graph

    place = choose_device(device)
    model = lower_graph(result.graph, device=place, dtype=dtype, tune=tune)
    if verify:
        noisy = _noisy(result.graph, model.rounded, model.dtype, place)
        model.report["parity"] = check_parity(
            result.artifact(place), model, tolerance=0.0, unrounded=_unrounded(result, place), noisy=noisy
        )
    result.report.targets["kernels"] = model.report
    return model


def _noisy(
    graph: Graph, rounded: Collection[str] | None, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Iterator[NativeArtifact]:
    """Samples of a graph with the errors of a dtype, behind the nodes named or all; one in memory at a time."""
    from qcompiler.lowering.kernels.noise import with_noise

    names = [node.name for node in graph.fx.nodes if node.op == "call_function"] if rounded is None else rounded
    for sample in range(_NOISE_SAMPLES):
        yield NativeArtifact(with_noise(graph, names, dtype, sample=sample), device=device)


def _unrounded(result: CompileResult, device: str | torch.device = "cpu") -> NativeArtifact | None:
    """The model with activations and caches in float, where it rounds them."""
    rounds = any(scheme.activation is not None for scheme in result.graph.schemes.values())
    rounds |= result.graph.signature.has_quantized_cache
    return NativeArtifact(result.graph, device=device, round_activations=False) if rounds else None


def open_artifact(
    path: str | Path,
    *,
    exact: bool = True,
    engine: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Anything that runs: ``OUT``, ``OUT/native``, ``OUT/onnx``, or a Hugging Face directory.

    Args:
        path: the directory.
        exact: for ONNX Runtime, compute with float activations; False allows its faster 8-bit ones.
        engine: ``kernels`` runs a native artifact by fused low-bit operators; by default, its reference arithmetic.
        device: ``cpu``, ``cuda`` or ``auto``; by default ``auto`` for kernels, and the CPU for everything else.
        trust_remote_code: for a Hugging Face directory, run the code it brings along.

    Raises:
        InputError: if the path is none of these, or does not run on this device.
        TargetError: for an unknown engine, or one that does not run what is there.
    """
    root = Path(path)
    if engine not in (None, "kernels"):
        raise TargetError("unknown engine", got=engine, expected="kernels")
    if not root.is_dir():
        raise InputError("no such directory", where=root)
    native = _native_directory(root)
    if (native / MANIFEST).is_file():
        if engine == "kernels":
            return lower(native, "kernels", verify=False, device=device or "auto")
        return load(native).artifact(choose_device(device or "cpu"))
    if engine is not None:
        raise TargetError("kernels run native artifacts alone", where=root, remedy="give OUT or OUT/native")
    if (root / "model.onnx").is_file():
        from qcompiler.lowering.onnx import OnnxArtifact

        if choose_device(device or "cpu").type != "cpu":
            raise InputError("ONNX models run on the CPU", where=root, got=device, expected="cpu")
        return OnnxArtifact(root, accuracy_level=1 if exact else 4)
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
    text: str | Path | None = None,
    tokens: Tensor | None = None,
    against: str | Path | Artifact | None = None,
    cached: bool | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity, and KL divergence to the original; see `qcompiler.evaluate`.

    Without text or tokens, the tokens are those the native artifact keeps from its calibration.

    Raises:
        InputError: without text, for an artifact that keeps no tokens; see also `qcompiler.evaluate`.
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


def generate(artifact: str | Path | Artifact | CompileResult, prompt: str, **options: Any) -> Generation:
    """Continues a prompt; options as in `qcompiler.generate`."""
    _check_seed(options.get("seed", 0))
    opened = _open(artifact, exact=False)
    if opened.path is None:
        raise InputError("this artifact has no tokenizer beside it", remedy="use qcompiler.generate.generate")
    return generate_text(opened, load_tokenizer(opened.path), prompt, **options)


def _open(artifact: str | Path | Artifact | CompileResult, *, exact: bool = True) -> Artifact:
    if isinstance(artifact, CompileResult):
        return artifact.artifact()
    if isinstance(artifact, (str, Path)):
        return open_artifact(artifact, exact=exact)
    return artifact
