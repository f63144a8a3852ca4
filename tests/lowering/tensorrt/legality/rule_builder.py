"""Builds small ONNX files with the real builder, one after the other: a process of its own, since a builder may crash.

Reads lines of JSON ``{"path": ..., "sm": ...}``; answers each with a line: ``outcome`` ("parse", "build" or "built"),
``errors``, and ``layers``, each ``[name, kind, types of constants, ONNX nodes]``.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def serve() -> None:
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((severity.name, text))

    def build(path: str, sm: int) -> dict[str, Any]:
        log = Log()
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(path):
            return {"outcome": "parse", "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        profile = builder.create_optimization_profile()
        for port in (network.get_input(i) for i in range(network.num_inputs)):
            if -1 in tuple(port.shape):
                sizes = [tuple(size if d == -1 else d for d in port.shape) for size in (1, 8, 16)]
                profile.set_shape(port.name, *sizes)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        errors = [text for severity, text in log.lines if "ERROR" in severity]
        return {"outcome": "built" if plan else "build", "errors": errors, "layers": list(layers(log.lines))}

    def layers(lines: list[tuple[str, str]]) -> Iterator[tuple[str, str, list[str], list[str]]]:
        for line in (line for _, text in lines if text.startswith("Layers:") for line in text.splitlines()):
            found = re.match(r"Name: (.*?), LayerType: (\w+), .*?Constants: \[(.*?)\], Outputs: \[", line)
            if found:
                constants = re.findall(r"Datatype: (\w+)", found[3])
                yield found[1], found[2], constants, re.findall(r"\[ONNX Layer: (.*?)\]", line)

    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(build(job["path"], job["sm"])), flush=True)


class Builder:
    """The process; a new one where it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def build(self, path: str, sm: int) -> dict[str, Any]:
        """As the module says; ``outcome`` is "crash" where the process died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"path": path, "sm": sm}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            return {"outcome": "crash", "errors": [], "layers": []}
        found: dict[str, Any] = json.loads(answer)
        if found["outcome"] == "build":
            self.close()  # what a failed build leaves behind changes the next one
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


if __name__ == "__main__":
    serve()
