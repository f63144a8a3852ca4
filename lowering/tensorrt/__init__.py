"""TensorRT: the ONNX that its builder fuses, engines built of it, and which layer everything went to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.frontend import import_with_onnx
from qcompiler.lowering.tensorrt.target import TensorRTTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.lowering.tensorrt.legality import Checked

__all__ = ["TensorRTTarget", "check"]


def check(source: "str | Path | ir.Model", sm: Sequence[int] = (89,)) -> "Checked":
    """What TensorRT refuses, computes differently or does not fuse in anybody's ONNX file; TensorRT is not needed.

    Args:
        source: the file, whose weights are not read, or a model.
        sm: compute capabilities of the GPUs it is to run on.

    Raises:
        InputError: for a file that is no ONNX model, or one whose parts are missing or contradict each other.
        TargetError: for a compute capability that the builder does not know.
        MissingDependencyError: without onnx and onnx_ir.
    """
    checked: Checked = import_with_onnx("qcompiler.lowering.tensorrt.legality").check(source, sm)
    return checked
