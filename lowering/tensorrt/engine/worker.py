"""Builds one engine in a process of its own: run as a script, with a request, by `build_engine`.

It needs nothing of qcompiler, so that what it takes is what the builder takes. What it tells are lines of JSON on a
pipe, each an object with one key:

| key | what |
|---|---|
| ``progress`` | steps done, steps in all, what is being done |
| ``message`` | severity and text, of the builder's warnings and errors |
| ``failed`` | ``kind``, ``what``, and what else is known |
| ``built`` | ``seconds``, ``peak_rss_bytes``, ``plan_bytes`` |

In the folder of the request, it leaves ``plan`` and ``layers.txt``, and ``cache`` where a timing cache is kept. It ends
with whoever started it: its standard input is then closed.
"""

import importlib
import json
import os
import re
import resource
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

_EVERY = 0.1  # seconds
_PROFILE = re.compile(r"Constructing optimization profile number (\d+)")


class Failure(Exception):
    """What ends the build, as it is told."""

    def __init__(self, kind: str, what: str, **details: object) -> None:
        super().__init__(what)
        self.fields = {"kind": kind, "what": what, **details}


class Teller:
    """Writes lines to the pipe, from any thread."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def tell(self, key: str, value: object) -> None:
        """Writes one object."""
        line = json.dumps({key: value}).encode() + b"\n"
        with self._lock:
            view = memoryview(line)
            while len(view):
                view = view[os.write(self._pipe, view) :]


class Progress:
    """Tells how many of the profiles are done, and which phase began last; the builder's own steps take no time."""

    def __init__(self, teller: Teller, profiles: list[str]) -> None:
        self._teller, self._profiles, self._lock = teller, profiles, threading.Lock()
        self._current: int | None = None
        self._told = 0.0

    def profile(self, index: int) -> None:
        """The builder begins with a profile."""
        with self._lock:
            self._current, self._told = index, 0.0
        self.phase("compiling")

    def phase(self, name: str) -> bool:
        """The builder is in a phase; whether anybody listens to that."""
        with self._lock:
            now = time.monotonic()
            if now - self._told < _EVERY:
                return True
            self._told = now
            if self._current is None or self._current >= len(self._profiles):
                name = name[:1].lower() + name[1:]
            else:
                name = f"profile {self._profiles[self._current]}: {name[:1].lower() + name[1:]}"
            state = [self._current or 0, max(1, len(self._profiles)), name]
        try:
            self._teller.tell("progress", state)
        except OSError:
            return False
        return True


def main(request_path: Path, pipe: int) -> None:
    """Builds what a request asks for, and tells how it ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    teller = Teller(pipe)
    try:
        request = json.loads(request_path.read_text())
        teller.tell("built", _build(request, request_path.parent, teller))
    except Failure as failure:
        teller.tell("failed", failure.fields)
    except MemoryError as error:
        teller.tell("failed", {"kind": "memory", "what": str(error) or "out of memory"})
    except OSError as error:
        teller.tell("failed", {"kind": "system", "what": str(error), "errno": error.errno})
    except Exception as error:  # whatever the bindings raise
        kind = "memory" if "bad_alloc" in str(error) else "error"
        teller.tell("failed", {"kind": kind, "what": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    os._exit(0)  # a builder that failed may not end well, and all is said


def _end_with_parent() -> NoReturn:
    while os.read(0, 1):
        pass
    os._exit(1)


def _build(request: dict[str, Any], folder: Path, teller: Teller) -> dict[str, object]:
    start = time.monotonic()
    teller.tell("progress", [0, 0, "starting the builder"])
    warnings.simplefilter("ignore")
    trt: Any = importlib.import_module(request["package"])
    progress = Progress(teller, [profile["name"] for profile in request["profiles"]])
    logger = _logger(trt, teller, progress, folder / "layers.txt")
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # what pybind11 makes of a null pointer: no driver, no GPU
        raise Failure("builder", str(error)) from error
    network = _parsed(trt, builder, logger, request["model"], teller)
    config = _configured(trt, builder, network, request, progress)
    cache = _timing_cache(trt, config, request["timing_cache"], teller)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Failure("build", "the builder failed")
    teller.tell("progress", [0, 0, "writing the plan"])
    _write(folder / "plan", plan)
    if not logger.has_layers:
        _inspect(trt, logger, plan, folder / "layers.txt")
    if cache:
        _write(folder / "cache", config.get_timing_cache().serialize())
    return {
        "seconds": time.monotonic() - start,
        "peak_rss_bytes": _peak_rss_bytes(),
        "plan_bytes": plan.nbytes,
        "version": trt.__version__,
    }


def _logger(trt: Any, teller: Teller, progress: Progress, layers: Path) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.has_layers = False

        def log(self, level: Any, text: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR, severity.WARNING):
                teller.tell("message", [level.name, text])
            elif text.startswith("Layers:"):
                self.has_layers = True
                with open(layers, "a") as file:
                    file.write(text + "\n")
            elif found := _PROFILE.match(text):
                progress.profile(int(found[1]))

    return Logger()


def _parsed(trt: Any, builder: Any, logger: Any, model: str, teller: Teller) -> Any:
    teller.tell("progress", [0, 0, "parsing the ONNX file"])
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(flags, "STRONGLY_TYPED", None)  # of no effect from TensorRT 11 on, where nothing else is left
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(model):
        return network
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    found = [
        {"node": error.node_name(), "operator": error.node_operator(), "text": error.desc()}
        for error in errors
        if error.desc()
    ]
    raise Failure("parse", "the parser refuses the file", errors=found)


def _configured(trt: Any, builder: Any, network: Any, request: dict[str, Any], progress: Progress) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["capability"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['capability']}"), 0)
    if request["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace"])
    if request["weight_streaming"]:
        flag = getattr(trt.BuilderFlag, "WEIGHT_STREAMING", None)
        if flag is None:
            raise Failure("flag", "this TensorRT does not stream weights")
        config.set_flag(flag)
    config.progress_monitor = _monitor(trt, progress)
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    for profile in request["profiles"]:
        _add_profile(builder, config, profile, inputs)
    varying = [name for name, shape in inputs.items() if -1 in shape]
    if varying and not request["profiles"]:
        raise Failure("profile", "no profile says which sizes the inputs have", got=", ".join(varying))
    return config


def _add_profile(builder: Any, config: Any, profile: dict[str, Any], inputs: dict[str, tuple[int, ...]]) -> None:
    where, shapes = f"profile {profile['name']}", profile["shapes"]
    if unknown := [name for name in shapes if name not in inputs]:
        raise Failure("profile", "a profile has an input that the model has not", where=where, got=", ".join(unknown))
    if missing := [name for name, shape in inputs.items() if -1 in shape and name not in shapes]:
        raise Failure("profile", "a profile lacks an input whose size varies", where=where, got=", ".join(missing))
    made = builder.create_optimization_profile()
    for name, three in shapes.items():
        shape = inputs[name]
        fits = all(
            len(given) == len(shape) and all(size in (-1, own) for own, size in zip(given, shape, strict=True))
            for given in three
        )
        if not fits or not all(a <= b <= c for a, b, c in zip(*three, strict=True)):
            raise Failure(
                "profile",
                "the shapes of a profile do not hold",
                where=f"{name} of {where}",
                got=" to ".join(str(given) for given in three),
                expected=f"least to optimal to largest, of {list(shape)}",
            )
        made.set_shape(name, *(tuple(given) for given in three))
    if config.add_optimization_profile(made) < 0:
        raise Failure("profile", "the builder refuses a profile", where=where, got=str(shapes))


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.phase(name)

        def step_complete(self, name: str, step: int) -> bool:
            return progress.phase(name)

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _timing_cache(trt: Any, config: Any, path: str | None, teller: Teller) -> bool:
    """Gives the builder the timings of earlier builds; whether there will be any to keep."""
    if path is None:
        return False
    if hasattr(trt, "ComputeCapability"):
        teller.tell("message", ["WARNING", "timing cache: kernels are timed on the GPU, when the engine is loaded"])
        return False
    known = Path(path).read_bytes() if Path(path).exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):
        teller.tell("message", ["WARNING", f"timing cache: {path} is of another GPU or version, and begun anew"])
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return True


def _inspect(trt: Any, logger: Any, plan: Any, layers: Path) -> None:
    """Asks the inspector, where there is a GPU, for what the builder did not log."""
    try:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    except (TypeError, RuntimeError):
        return
    if engine is not None:
        layers.write_text(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def _write(path: Path, data: Any) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _peak_rss_bytes() -> int:
    """Of this program alone: what `resource` says may be of the one that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
