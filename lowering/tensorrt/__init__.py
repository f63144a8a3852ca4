"""TensorRT: what its parser and builder make of an ONNX file."""

from qcompiler.lowering.tensorrt.legality import Checked, Finding, check, check_model

__all__ = ["Checked", "Finding", "check", "check_model"]
