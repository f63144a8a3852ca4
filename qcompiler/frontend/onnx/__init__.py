"""ONNX models in: a file becomes the same canonical graph as a directory of transformers.

``nodes`` reads and checks the file, ``ports`` finds what inputs and outputs are for, ``layers`` takes out weights that
are codes already, ``interpreter`` computes what is left by the functions of ``operators``, `capture` traces that.
"""

from qcompiler.frontend.onnx.capture import capture_onnx, has_codes

__all__ = ["capture_onnx", "has_codes"]
