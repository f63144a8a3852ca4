"""TensorRT: the ONNX that its builder fuses, engines built of it, and which layer everything went to."""

from qcompiler.lowering.tensorrt.target import TensorRTTarget

__all__ = ["TensorRTTarget"]
