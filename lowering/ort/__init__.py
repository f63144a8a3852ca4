"""ONNX Runtime at full speed: its own operators, in a folder that onnxruntime-genai runs too."""

from qcompiler.lowering.ort.target import OrtTarget

__all__ = ["OrtTarget"]
