"""`lower`: carries a compiled model to a target, compares what came out, and puts it into the report.

With `qcompiler.api` and `qcompiler.cli`, a module that sees the targets; which there are, `qcompiler.lowering` says.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from qcompiler.artifacts import (
    CompileResult,
    StreamedArtifact,
    add_target,
    check_by_inputs,
    check_parity,
    load,
    noisy_samples,
)
from qcompiler.errors import InputError, QCompilerError, TargetError, did_you_mean
from qcompiler.ir import Graph, cache_formats, formats_by_cache
from qcompiler.lowering import targets
from qcompiler.protocol import (
    Artifact,
    Compilation,
    Lowered,
    Target,
    check_caches,
    check_schemes,
    foreign,
    import_object,
    list_options,
    read_options,
    unknown_option,
    with_taken_tables,
)
from qcompiler.storage import filled_directory

if TYPE_CHECKING:
    from qcompiler.lowering.kernels import KernelModel

__all__ = [
    "check_target",
    "describe_targets",
    "lower",
    "make_target",
    "open_with_engine",
    "record_target",
    "try_target",
    "verify",
    "write_target",
]


def make_target(target: str | Target, /, **options: Any) -> Target:
    """A target by its name, such as ``onnx``, or somebody else's by the place it lies at.

    Args:
        target: a name; ``package.module:NAME`` or ``path/to/file.py:NAME`` of a `Target` class or instance, which is
            imported and so runs; or a target, which is given back. Behind a colon, options may follow as text:
            ``onnx:opset=23,float_dtype=float16``; a name may be cut short, as in ``float=float16``.
        options: by name, as values.

    Raises:
        TargetError: for an unknown target or option, or a value that an option does not take.
    """
    if isinstance(target, Target):
        return _with_options(target, options, target.name)
    name, texts = _in_parts(target)
    found = _by_name(name)
    cls = found if isinstance(found, type) else type(found)
    return _with_options(found, {**read_options(cls, texts, TargetError), **options}, name)


def _in_parts(text: str) -> tuple[str, dict[str, str]]:
    """The name or place, and the options."""
    name, _, rest = text.partition(":")
    if name.endswith(".py") or "." in name:
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    items = [item.partition("=") for item in rest.split(",") if item]
    repeated = {key for key, *_ in items if [key for key, *_ in items].count(key) > 1}
    if repeated or not all(equals for _, equals, _ in items):
        raise TargetError(
            "an option of a target is NAME=VALUE, each at most once", got=text, expected="such as onnx:opset=23"
        )
    return name, {key: value for key, _, value in items}


def _by_name(name: str) -> type[Target] | Target:
    known = {target.name: target for target in targets()}
    if name in known:
        return known[name]
    if ":" not in name:
        raise TargetError(
            "unknown target",
            got=name,
            expected=f"{', '.join(known)}, or file.py:NAME",
            remedy=did_you_mean(name, tuple(known)),
        )
    found = import_object(name, kind="target", offers=_is_target, error=TargetError)
    if not _is_target(found):
        raise TargetError("this is no target", where=name, got=repr(found), expected="a Target class or an instance")
    if not (isinstance(getattr(found, "name", None), str) and found.name.isidentifier()) or found.name == "native":
        raise TargetError(
            "a target needs a name, which its directory gets",
            where=name,
            got=repr(getattr(found, "name", None)),
            expected="a word of letters, digits and underscores other than native",
        )
    checked: type[Target] | Target = found
    return checked


def _is_target(value: object) -> bool:
    return isinstance(value, Target) or (isinstance(value, type) and issubclass(value, Target) and value is not Target)


def _with_options(target: type[Target] | Target, options: Mapping[str, Any], where: str) -> Target:
    cls = target if isinstance(target, type) else type(target)
    for name in options:
        if name not in [field.name for field in dataclasses.fields(cls)]:
            raise unknown_option(cls, name, TargetError)
    with foreign("this target cannot be made", where, error=TargetError):
        return target(**options) if isinstance(target, type) else dataclasses.replace(target, **options)


def describe_targets() -> list[dict[str, Any]]:
    """The targets that come along: name, summary, what they write, options, and packages that are missing here."""
    return [
        {
            "name": cls.name,
            "summary": (cls.__doc__ or "").partition("\n")[0],
            "writes": cls.main_file,
            "options": [dataclasses.asdict(option) for option in list_options(cls)],
            "missing": cls.missing_packages(),
        }
        for cls in targets()
    ]


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
    result: CompileResult | str | Path,
    target: str | Target,
    directory: str | Path,
    *,
    verify: bool = True,
    **options: Any,
) -> dict[str, Any]: ...


@overload
def lower(
    result: CompileResult | str | Path, target: Target, directory: None = None, *, verify: bool = True
) -> Artifact: ...


def lower(
    result: CompileResult | str | Path,
    target: str | Target,
    directory: str | Path | None = None,
    *,
    verify: bool = True,
    **options: Any,
) -> Any:
    """Lowers a compiled model to a target, and compares what came out with the native artifact.

    Args:
        result: a compiled model, or the directory of a native artifact.
        target: as `make_target` takes it; ``onnx`` is written, ``kernels`` is a module in memory.
        directory: for a target that is written, a new or empty one, a link to such a one, or a mount point.
        verify: run both on a few tokens, and put the difference in the report.
        options: of the target: for ``onnx``, ``opset`` and ``float_dtype``; for ``kernels``, ``device`` (``cpu``,
            ``cuda`` or ``auto``), ``dtype`` (of activations) and ``tune`` (search for launch configurations).

    The report of the result grows by this target; so does the one beside the native artifact that the result was saved
    to or read from.

    Returns:
        For a target that is written, its report, with ``parity`` where it was verified. For another, the model (of
        ``kernels``, a `qcompiler.lowering.kernels.KernelModel`), which has such a report.

    Raises:
        TargetError: for an unknown target or option, something the target does not take, or a directory that is
            missing or one too many.
        VerificationError: if what came out computes something else.
    """
    made = make_target(target, **options)
    if (directory is None) is (made.main_file is not None):
        raise TargetError(
            "this target is written to a directory" if directory is None else "this target is not written anywhere",
            where=made.name,
            got="no directory" if directory is None else directory,
            expected="a new or empty directory" if directory is None else "no directory: a model in memory comes back",
        )
    if not isinstance(result, CompileResult):
        result = load(result)
    check_target(result, made)
    if directory is None:
        lowered = _lower(result, made, lambda graph: made.lower(graph, None), verify=verify)
        record_target(result, made.name, lowered.report)
        return lowered.model
    written = write_target(result, made, directory, verify=verify)
    record_target(result, made.name, written)
    return written


def check_target(result: CompileResult, target: Target) -> None:
    """Refuses, ahead of all work, what a target does not take of a compiled model.

    Raises:
        TargetError: that says what and why.
        MissingDependencyError: without a package that it needs.
    """
    check_schemes(result.graph.schemes, {site.name: site.in_features for site in result.graph.sites()}, [target])
    check_caches(cache_formats(result.graph), [target])
    target.check_cached(formats_by_cache(result.graph))
    graph = with_taken_tables(result.graph, target)
    target.check_graph(graph)
    target.check_assigned(graph)


def write_target(
    result: CompileResult,
    target: Target,
    directory: str | Path,
    *,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """`lower` to a target with files, without an entry in any report yet: for who moves the directory afterwards.

    The target is not asked about the model: see `check_target`. ``progress`` is told steps done, steps in all (0 where
    nobody knows) and what is being done.
    """
    assert target.main_file is not None
    # compared in a place that is not final yet: what was not verified must not look as if it had been
    with filled_directory(directory, last=target.main_file) as place:
        lowered = _lower(
            result,
            target,
            lambda graph: target.lower_showing(graph, place, progress) if progress else target.lower(graph, place),
            verify=verify,
        )
        if lowered.finish is not None:
            recipe, report = result.manifest.get("recipe", ()), result.report
            lowered.finish(Compilation(recipe, report.calibration, report.held_out, result.held_out))
    return {**lowered.report, "path": str(directory)}


def try_target(result: CompileResult, target: Target) -> dict[str, Any]:
    """`lower` to a target without files whose model nobody keeps, so that it need not be in memory as a whole."""
    return _lower(result, target, target.lower_streamed, verify=True).report


def record_target(result: CompileResult, name: str, written: dict[str, Any]) -> None:
    """Adds what `write_target` gave to the report, and to the saved one where the result was saved or read from.

    Where that cannot be written, a note in ``written`` says so: what was lowered is whole all the same.
    """
    result.report.targets[name] = written
    if result.saved_in is not None:
        try:
            add_target(result.saved_in, result.graph, result.manifest, name, written)
        except QCompilerError as error:
            written["notes"].append(f"not in the report of {result.saved_in}: {error.what}: {error.got}")


def verify(
    checkpoint: str | Path,
    reader: str,
    *,
    native: str | Path | None = None,
    python: str | Path | None = None,
    tokens: Tensor | None = None,
    timeout: float = 3600,
) -> dict[str, Any]:
    """Lets an engine read a written checkpoint, and compares what it computes with the native artifact.

    The result goes into the report beside the native artifact. The engine runs in a process of its own.

    Args:
        checkpoint: what the target ``checkpoint`` wrote, such as ``OUT/checkpoint``.
        reader: ``transformers``, ``vllm``, ``llama.cpp`` or ``gptqmodel``.
        native: the artifact it was written of; by default ``native`` beside it.
        python: the interpreter of an environment that has the engine; by default this one.
        tokens: int64 ``[rows, length]`` to begin with, by default random; 64 more are what the native artifact
            continues them with.
        timeout: seconds that the engine may take.

    Returns:
        As `qcompiler.lowering.checkpoint.readers.compare`.

    Raises:
        VerificationError: if the engine computes something else, or does not load the checkpoint.
        MissingDependencyError: if the engine is not there.
        InputError, TargetError: for paths, tokens or a reader that cannot be used.
    """
    from qcompiler.lowering.checkpoint.readers import ENGINES, compare

    engines = {engine.name: engine for engine in ENGINES}
    if reader not in engines:
        remedy = did_you_mean(reader, engines)
        raise TargetError("unknown reader", got=reader, expected=", ".join(engines), remedy=remedy)
    directory = Path(checkpoint)
    if not (directory / "config.json").is_file():
        raise InputError(
            "there is no checkpoint", where=directory, got="no config.json", expected="such as OUT/checkpoint"
        )
    result = load(directory.parent if native is None else native)
    if result.saved_in is None:
        raise InputError("this is no native artifact", where=native, remedy="name it: --native OUT/native")
    found = compare(
        result,
        directory,
        engines[reader],
        prompts=tokens,
        python=None if python is None else Path(python),
        timeout=timeout,
    )
    entry = {"path": str(directory), "notes": [], **result.report.targets.get("checkpoint", {})}
    record_target(result, "checkpoint", {**entry, f"parity with {reader}": found})
    return found


def open_with_engine(result: CompileResult, engine: str, device: str) -> Artifact:
    """A compiled model run by what a target without files makes of it.

    Raises:
        TargetError: if there is no such target.
    """
    engines = [cls.name for cls in targets() if cls.main_file is None]
    if engine not in engines:
        raise TargetError("unknown engine", got=engine, expected=", ".join(engines))
    target = make_target(engine, device=device)
    model = target.lower(with_taken_tables(result.graph, target), None).model
    assert model is not None
    return model


def _lower(result: CompileResult, target: Target, lower: Callable[[Graph], Lowered], *, verify: bool) -> Lowered:
    """Lowers with tables of floats where the target takes no others, and compares what came out."""
    graph = with_taken_tables(result.graph, target)
    lowered = lower(graph)
    if graph is not result.graph:
        lowered.report.setdefault("notes", []).append("the embedding table is float, of the same numbers, not codes")
    _compare(result, lowered, verify=verify)
    return lowered


def _compare(result: CompileResult, lowered: Lowered, *, verify: bool) -> None:
    """Lets every reader run what came out beside the native artifact, which is run by segments; the report grows."""
    if verify and result.graph.signature.input("ids") is None:
        check_by_inputs(result.graph, lowered)
    if not verify or result.graph.signature.index_of_output("logits") is None:
        return
    for reader in lowered.readers:
        found = reader.open()
        if reader.held_out_tokens and result.held_out is not None:
            found.forward(result.held_out[:1, : reader.held_out_tokens])
        rows, length = reader.tokens
        unrounded = _unrounded(result, lowered.device)
        admits_noise = reader.rounded is not None or unrounded is not None
        samples = noisy_samples(result.graph, reader.rounded, reader.dtype) if admits_noise else ()
        lowered.report[reader.entry] = check_parity(
            StreamedArtifact(result.graph, device=lowered.device),
            found,
            tolerance=reader.tolerance,
            unrounded=unrounded,
            noisy=(StreamedArtifact(sample, device=lowered.device) for sample in samples),
            rows=rows,
            length=length,
            steps=reader.steps,
        )


def _unrounded(result: CompileResult, device: str) -> StreamedArtifact | None:
    """The model with activations and caches in float, where it rounds them."""
    rounds = any(scheme.activation is not None for scheme in result.graph.schemes.values())
    rounds |= result.graph.signature.has_quantized_cache
    return StreamedArtifact(result.graph, device=device, round_activations=False) if rounds else None
