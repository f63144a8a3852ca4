"""An engine built in a child process: a builder that crashes costs an error, not the run."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, QCompilerError, ResourceError, TargetError
from qcompiler.lowering.tensorrt.engine.api import Api, find_api
from qcompiler.lowering.tensorrt.engine.layers import Layer, parse_layers
from qcompiler.lowering.tensorrt.engine.profiles import Profile
from qcompiler.storage import made_directory, remove_tree, undisturbed, write_errors

__all__ = ["Built", "build_engine"]

Progress = Callable[[int, int, str], None]

_WORKER = Path(__file__).with_name("worker.py")
_SHOWN = 4  # messages of the builder in an error
_ROUTINE = ("Make sure input",)  # of the types of inputs, which the plan tells
_PLACE = re.compile(r"^\w+\.cpp:\d+: ")
_NAME = re.compile(r"\S*[\d./]\S*")
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate memory")


@dataclass(frozen=True)
class Built:
    """An engine that was built.

    Attributes:
        plan: the file.
        capability: of the GPUs that it is for.
        package: that built it, and loads it: ``tensorrt`` or ``tensorrt_rtx``.
        version: of that; no other loads the plan.
        seconds: that the child took.
        peak_rss_bytes: the largest resident memory of the child.
        plan_bytes: of the file.
        layers: of the engine, as the builder says.
        warnings: of the builder, those of a kind once.
    """

    plan: Path
    capability: int
    package: str
    version: str
    seconds: float
    peak_rss_bytes: int
    plan_bytes: int
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields without the layers."""
        names = ("capability", "package", "version", "seconds", "peak_rss_bytes", "plan_bytes")
        return {
            "plan": self.plan.name,
            **{name: getattr(self, name) for name in names},
            "warnings": list(self.warnings),
        }


@dataclass
class _Told:
    """What a child said until it ended."""

    built: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def build_engine(
    model: Path,
    plan: Path,
    *,
    capability: int,
    profiles: Sequence[Profile] = (),
    weight_streaming: bool = False,
    timing_cache: Path | None = None,
    workspace: int | None = None,
    package: str | None = None,
    progress: Progress | None = None,
) -> Built:
    """Builds an engine of an ONNX file. The plan appears whole, or not at all; an interrupt ends the child at once.

    Args:
        model: the ONNX file; its external data lie where it says.
        plan: the file to write; its folder is made if missing, and what was there is replaced.
        capability: compute capability of the GPU it is for, such as 89.
        profiles: in order; needed where sizes of inputs vary.
        weight_streaming: keep weights in host memory, to be streamed when they are wanted.
        timing_cache: a file of timings that is read, if it is there, and written; TensorRT for RTX times nothing.
        workspace: bytes of GPU memory that a layer may take for intermediate values; None: as the builder does.
        package: the TensorRT to take, see `find_api`.
        progress: is told steps done, steps in all (0 where nobody knows) and what is being done.

    Raises:
        MissingDependencyError: without TensorRT.
        TargetError: for a capability or profile that the builder does not take, a file that its parser refuses (with
            the node and the reason), or a builder that fails or crashes.
        ResourceError: if the builder runs out of memory, or the disk is full.
        InputError: if the model cannot be read, or the plan cannot be written.
    """
    api = find_api(package, capability=capability)
    if not model.is_file():
        raise InputError("there is no ONNX file", where=model)
    request = {
        "package": api.package,
        "model": str(model.absolute()),
        "capability": None if api.capabilities is None else capability,
        "profiles": [profile.to_dict() for profile in profiles],
        "weight_streaming": weight_streaming,
        "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
        "workspace": workspace,
    }
    with _folder(plan.parent) as folder:
        with write_errors(plan):
            (folder / "request.json").write_text(json.dumps(request))
        told, status = _run(folder, progress)
        if told.built is None:
            raise _failure(told, status, folder, model, plan, api)
        listed = folder / "layers.txt"
        layers = parse_layers(listed.read_text(errors="replace")) if listed.exists() else ()
        with write_errors(plan), undisturbed():
            os.replace(folder / "plan", plan)
        if timing_cache is not None and (folder / "cache").exists():
            with write_errors(timing_cache), undisturbed():
                os.replace(folder / "cache", timing_cache)
    return Built(
        plan,
        capability,
        api.package,
        told.built["version"],
        told.built["seconds"],
        told.built["peak_rss_bytes"],
        told.built["plan_bytes"],
        layers,
        _each_once(told.warnings),
    )


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A folder beside the plan, so that it can be moved there, which goes when the block ends."""
    folder: Path | None = None
    with made_directory(directory):
        try:
            with write_errors(directory), undisturbed():
                folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
            yield folder
        finally:
            if folder is not None:
                remove_tree(folder)


def _run(folder: Path, progress: Progress | None) -> tuple[_Told, int]:
    """Runs the child and hears what it tells.

    Its standard input is a pipe that ends with this program, so that it does, too. It is in a session of its own: an
    interrupt from the keyboard comes here alone.
    """
    told = _Told()
    reading, writing = os.pipe()
    with open(reading) as lines, open(folder / "output.txt", "wb") as output:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), str(folder / "request.json"), str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            for line in lines:
                _hear(line, told, progress)
            status = child.wait()
        finally:
            with undisturbed():
                child.kill()
                child.wait()
                assert child.stdin is not None
                with suppress(OSError):
                    child.stdin.close()
    return told, status


def _hear(line: str, told: _Told, progress: Progress | None) -> None:
    try:
        said = json.loads(line)
    except json.JSONDecodeError:  # it ended in the middle of one
        return
    if "built" in said:
        told.built = said["built"]
    elif "failed" in said:
        told.failed = said["failed"]
    elif "message" in said:
        severity, text = said["message"]
        (told.warnings if severity == "WARNING" else told.errors).append(text)
    elif progress is not None:
        progress(*said["progress"])


def _each_once(warnings: Sequence[str]) -> tuple[str, ...]:
    """Warnings without the place in the builder's source; those that differ in a name or number alone are counted."""
    texts = [_PLACE.sub("", text) for text in warnings if not any(words in text for words in _ROUTINE)]
    kinds = {text: _NAME.sub("*", text) for text in texts}
    counts = Counter(kinds[text] for text in texts)
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(kinds[text], text)
    return tuple(f"{text} ({counts[kind]} such)" if counts[kind] > 1 else text for kind, text in first.items())


def _failure(told: _Told, status: int, folder: Path, model: Path, plan: Path, api: Api) -> QCompilerError:
    """The error that a build ended with."""
    failed = told.failed or {}
    kind, what = failed.get("kind"), str(failed.get("what", ""))
    said = "; ".join(dict.fromkeys(told.errors[-_SHOWN:])) or what
    builder = f"{api.package} {api.version}"
    if kind == "memory" or any(word in (said + what).lower() for word in _OUT_OF_MEMORY):
        return _out_of_memory(said, builder)
    if kind == "parse":
        return _refused(failed["errors"], said, model, builder)
    if kind == "profile":
        return TargetError(what, where=failed.get("where"), got=failed.get("got"), expected=failed.get("expected"))
    if kind == "builder":
        return TargetError(
            "TensorRT's builder does not start",
            where=builder,
            got=said,
            remedy="it needs an NVIDIA driver and a GPU; tensorrt-rtx builds without: pip install tensorrt-rtx",
        )
    if kind == "flag":
        return TargetError(what, where=builder)
    if kind == "system":
        return _of_system(failed, plan)
    if kind is not None:
        return TargetError("TensorRT's builder failed", where=model, got=said, remedy=_advice(said))
    output = (folder / "output.txt").read_text(errors="replace").strip().splitlines() if folder.exists() else []
    said = "; ".join([*told.errors[-_SHOWN:], *output[-_SHOWN:]])
    if any(word in said.lower() for word in _OUT_OF_MEMORY):
        return _out_of_memory(said, builder)
    if status == -signal.SIGKILL:
        return _out_of_memory("the builder was killed, as a system does that has no memory left", builder)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return TargetError("TensorRT's builder crashed", where=f"{builder}, {model}", got=f"{how}; {said}" if said else how)


def _of_system(failed: Mapping[str, Any], plan: Path) -> QCompilerError:
    try:
        with write_errors(plan):
            raise OSError(failed["errno"], failed["what"])
    except QCompilerError as error:
        return error


def _out_of_memory(said: str, builder: str) -> ResourceError:
    return ResourceError(
        "TensorRT's builder ran out of memory",
        where=builder,
        got=said,
        remedy="it holds the weights at least twice: build on a machine with more memory, or with fewer profiles",
    )


def _refused(errors: Sequence[Mapping[str, str]], said: str, model: Path, builder: str) -> TargetError:
    if not errors:
        return TargetError("TensorRT's parser cannot read this file", where=model, got=said or "no reason given")
    first = errors[0]
    node = " ".join(part for part in (first["operator"], first["node"]) if part)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return TargetError(
        "TensorRT's parser refuses this file",
        where=f"node {node} of {model}" if node else model,
        got=first["text"] + more,
        expected=f"what {builder} takes",
    )


def _advice(said: str) -> str | None:
    if "decompos" in said.lower():
        return (
            "no kernel of attention fits these shapes and types: float16, heads of up to 256 channels, more than one; "
            "with two heads, profiles of up to two tokens or more (sequence=1..2), not fixed at one; with "
            "attention=fp8 of 32 tokens or more (sequence=32..512), or of one"
        )
    return None
