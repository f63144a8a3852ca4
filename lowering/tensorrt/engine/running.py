"""What lies beside an engine for those who run it: a script of its own, and the lines that build it elsewhere."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from qcompiler.lowering.tensorrt.engine.profiles import Profile

__all__ = ["command_lines", "run_script"]

_TEMPLATE = Path(__file__).with_name("run_template.py")
_BUILT_BY = 'PACKAGE, VERSION = "tensorrt_rtx", "of any version"'


def run_script(package: str, version: str) -> str:
    """The text of ``run.py``, which loads the plans beside it and needs nothing of qcompiler.

    It expects them to be called ``engine-sm<capability>.plan``, the first profile to be one to read prompts with and
    the second, if there is one, to decode with, and inputs and outputs of their usual names.

    Args:
        package: that built the plans, ``tensorrt`` or ``tensorrt_rtx``.
        version: of that.
    """
    text = _TEMPLATE.read_text()
    assert _BUILT_BY in text
    return text.replace(_BUILT_BY, f'PACKAGE, VERSION = "{package}", "{version}"')


def command_lines(
    model: str,
    plan: str,
    profiles: Sequence[Profile],
    *,
    capability: int,
    weight_streaming: bool = False,
    workspace: int | None = None,
) -> dict[str, str]:
    """The lines that build the same engine with NVIDIA's programs: ``tensorrt_rtx`` anywhere, ``trtexec`` on the GPU.

    Options as NVIDIA documents them for TensorRT for RTX 1.x, and for ``trtexec`` of TensorRT 10 and 11, where
    ``--stronglyTyped`` has no effect any more; the lines were not run here.

    Args:
        model: the ONNX file.
        plan: the file to write.
        profiles: in order.
        capability: compute capability of the GPU.
        weight_streaming: as given to `build_engine`.
        workspace: bytes, as given to `build_engine`.
    """
    common = [f"--onnx={model}"]
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            common.append(f"--profile={index}")
        for place, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = (f"{name}:{'x'.join(map(str, three[place]))}" for name, three in profile.shapes.items())
            common.append(f"--{option}={','.join(shapes)}")
    if weight_streaming:
        common.append("--allowWeightStreaming")
    if workspace is not None:
        common.append(f"--memPoolSize=workspace:{workspace / 2**20:g}")  # in MiB
    common += ["--profilingVerbosity=detailed", f"--saveEngine={plan}", "--skipInference"]
    return {
        "tensorrt_rtx": shlex.join(["tensorrt_rtx", *common, f"--computeCapabilities={capability}"]),
        "trtexec": shlex.join(["trtexec", *common, "--stronglyTyped"]),
    }
