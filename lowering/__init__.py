"""Targets: a folder each, writer beside reader; `targets` lists them, and nothing else knows their names."""

from qcompiler.protocol import Target

__all__ = ["targets"]


def targets() -> tuple[type[Target], ...]:
    """The targets that come along, in the order in which they are listed to users."""
    from qcompiler.lowering.checkpoint import CheckpointTarget
    from qcompiler.lowering.kernels import KernelsTarget
    from qcompiler.lowering.onnx import OnnxTarget
    from qcompiler.lowering.ort import OrtTarget
    from qcompiler.lowering.tensorrt import TensorRTTarget

    return OrtTarget, OnnxTarget, TensorRTTarget, CheckpointTarget, KernelsTarget
