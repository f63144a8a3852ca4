"""`lower`: carries a compiled model to a target, compares what came out, and puts it into the report.

With `qcompiler.api` and `qcompiler.cli`, a module that sees the targets.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from qcompiler.artifacts import CompileResult, NativeArtifact, add_target, check_parity, load
from qcompiler.errors import QCompilerError, TargetError, did_you_mean
from qcompiler.ir import Graph
from qcompiler.protocol import TargetSpec, check_schemes
from qcompiler.storage import filled_directory
from qcompiler.sweep import choose_device

if TYPE_CHECKING:
    from qcompiler.lowering.kernels.module.model import KernelModel

__all__ = [
    "WRITTEN_TARGETS",
    "check_target",
    "lower",
    "lower_to_kernels",
    "record_target",
    "target_spec",
    "write_target",
]

WRITTEN_TARGETS = ("onnx",)
_TARGETS = (*WRITTEN_TARGETS, "kernels")
_NOISE_SAMPLES = 3
_FLOAT16_TOKENS = 16  # evaluated operator by operator, which is slow


def target_spec(
    name: str, *, opset: int | None = None, float_dtype: Literal["float32", "float16"] = "float32"
) -> TargetSpec:
    """The target of a name such as ``onnx``.

    Args:
        name: the target.
        opset: for ``onnx``, the operator set; by default the one that `lower` takes.
        float_dtype: for ``onnx``, of weights and activations.

    Raises:
        TargetError: for an unknown one, or an operator set that cannot be written.
    """
    if name == "onnx":
        from qcompiler.lowering.onnx import OnnxTarget

        return OnnxTarget(float_dtype=float_dtype) if opset is None else OnnxTarget(opset, float_dtype)
    if name == "kernels":
        from qcompiler.lowering.kernels.target import KernelsTarget

        return KernelsTarget("cuda" if torch.cuda.is_available() else "cpu")
    raise TargetError("unknown target", got=name, expected=", ".join(_TARGETS), remedy=did_you_mean(name, _TARGETS))


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
        directory: for ``onnx``, a new or empty one, a link to such a one, or a mount point.
        verify: run both on a few tokens, and put the difference in the report.
        options: of the target: for ``onnx``, ``opset`` and ``float_dtype``; for ``kernels``, ``device`` (``cpu``,
            ``cuda`` or ``auto``), ``dtype`` (of activations) and ``tune`` (search for launch configurations).

    The report of the result grows by this target; so does the one beside the native artifact that the result was saved
    to or read from.

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
    if directory is None:
        with _unknown_options(target):
            model = lower_to_kernels(result, verify=verify, **options)
        record_target(result, target, model.report)
        return model
    written = write_target(result, target, directory, verify=verify, **options)
    record_target(result, target, written)
    return written


def check_target(result: CompileResult, target: str, **options: Any) -> None:
    """Refuses, ahead of all work, what a target does not take of a compiled model.

    Raises:
        TargetError: that says what and why.
        MissingDependencyError: without a package that it needs.
    """
    spec = target_spec(target, **options)
    check_schemes(result.graph.schemes, {site.name: site.in_features for site in result.graph.sites()}, [spec])
    spec.check_graph(result.graph)


def write_target(
    result: CompileResult, target: str, directory: str | Path, *, verify: bool = True, **options: Any
) -> dict[str, Any]:
    """`lower` to a target with files, without an entry in any report yet: for who moves the directory afterwards."""
    with _unknown_options(target):
        return _lower_to_onnx(result, directory, verify=verify, **options)


def record_target(result: CompileResult, target: str, written: dict[str, Any]) -> None:
    """Adds what `write_target` gave to the report, and to the saved one where the result was saved or read from.

    Where that cannot be written, a note in ``written`` says so: what was lowered is whole all the same.
    """
    result.report.targets[target] = written
    if result.saved_in is not None:
        try:
            add_target(result.saved_in, result.graph, result.manifest, target, written)
        except QCompilerError as error:
            written["notes"].append(f"not in the report of {result.saved_in}: {error.what}: {error.got}")


@contextmanager
def _unknown_options(target: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise TargetError("unknown option of a target", where=target, got=error) from error


def _lower_to_onnx(result: CompileResult, directory: str | Path, *, verify: bool, **options: Any) -> dict[str, Any]:
    from qcompiler.lowering import onnx

    with filled_directory(directory, last="model.onnx") as place:
        written = onnx.lower(result.graph, place, companions=result.graph.provenance.get("companions"), **options)
        if verify and result.graph.signature.index_of_output("logits") is not None:
            # of a file that is not in its place yet: what was not verified must not look as if it had been
            is_half = options.get("float_dtype") == "float16"
            tolerance, unrounded = 2e-2 if is_half else 1e-3, _unrounded(result)
            written["parity"] = check_parity(
                result.artifact(),
                onnx.OnnxArtifact(place, accuracy_level=1),
                tolerance=tolerance,
                unrounded=unrounded,
                noisy=()
                if unrounded is None
                else _noisy(result.graph, None, torch.float16 if is_half else torch.float32),
            )
            if is_half:
                written["float16_parity"] = _check_float16(result, place, tolerance)
    return {**written, "path": str(directory)}


def _check_float16(result: CompileResult, directory: Path, tolerance: float) -> dict[str, Any]:
    """The same comparison in true float16, which ONNX Runtime does not compute in on a CPU; a few tokens."""
    from qcompiler.lowering.onnx.reference import Float16Artifact

    evaluated = Float16Artifact(directory)
    if result.held_out is not None:
        evaluated.forward(result.held_out[:1, :_FLOAT16_TOKENS])  # refuses what overflows on real text
    unrounded = _unrounded(result)
    return check_parity(
        result.artifact(),
        evaluated,
        tolerance=tolerance,
        unrounded=unrounded,
        noisy=() if unrounded is None else _noisy(result.graph, None, torch.float16),
        rows=1,
        length=_FLOAT16_TOKENS,
    )


def lower_to_kernels(
    result: CompileResult, *, verify: bool, device: str = "auto", dtype: str | None = None, tune: bool = False
) -> "KernelModel":
    """`lower` to kernels, without an entry in any report."""
    from qcompiler.lowering.kernels.module.model import lower as lower_graph

    place = choose_device(device)
    model = lower_graph(result.graph, device=place, dtype=dtype, tune=tune)
    if verify:
        noisy = _noisy(result.graph, model.rounded, model.dtype, place)
        model.report["parity"] = check_parity(
            result.artifact(place), model, tolerance=0.0, unrounded=_unrounded(result, place), noisy=noisy
        )
    return model


def _noisy(
    graph: Graph, rounded: Collection[str] | None, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Iterator[NativeArtifact]:
    """Samples of a graph with the errors of a dtype, behind the nodes named or all; one in memory at a time."""
    from qcompiler.lowering.kernels.module.noise import with_noise

    names = [node.name for node in graph.fx.nodes if node.op == "call_function"] if rounded is None else rounded
    for sample in range(_NOISE_SAMPLES):
        yield NativeArtifact(with_noise(graph, names, dtype, sample=sample), device=device)


def _unrounded(result: CompileResult, device: str | torch.device = "cpu") -> NativeArtifact | None:
    """The model with activations and caches in float, where it rounds them."""
    rounds = any(scheme.activation is not None for scheme in result.graph.schemes.values())
    rounds |= result.graph.signature.has_quantized_cache
    return NativeArtifact(result.graph, device=device, round_activations=False) if rounds else None
