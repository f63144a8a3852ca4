"""The ``kernels`` target: a quantized graph as a callable module whose layers are fused low-bit operators.

`lower` makes a `KernelModel` of a graph; `KernelsTarget` says what becomes of a scheme. Every operator is a
``torch.library`` operator of the namespace ``qcompiler_kernels`` with a shape function, a reference (the arithmetic of
quantize and dequantize nodes, any device), a CPU implementation and a CUDA one in Triton.
Each operator has a folder: `operator` (schema, reference, choice), `layout`, `config`, `cpu`, and ``triton_*``, which
are imported only where they are launched, so that nothing here needs Triton to be installed.

| folder | what |
|---|---|
| ``module/`` | from a graph to a module: what has a kernel (`forms`), what becomes of it (`plan`), and `KernelModel` |
| ``launch/`` | the device, the namespace of operators, tuned configurations, machine code to read |
| ``weight_only/`` | ``weight_only_linear``: 2, 3, 4, 8 bits; float16 and bfloat16 activations |
| ``scaled_linear/`` | ``scaled_linear``: INT8, FP8, INT4 in groups; INT8 and FP8 activations |
| ``codebook_linear/`` | ``codebook_linear``: tables of 4 to 16 values and a sparse matrix |
| ``rows/`` | ``quantize_rows``, ``quantize_static``, ``rms_norm``, ``gated``, ``rotary``: what stands between |
| ``cache/`` | ``append_quantized``, ``append_static``, ``decode_attention``: caches in INT8, FP8, INT4 or float |
"""

from qcompiler.lowering.kernels.module.model import KernelModel, lower
from qcompiler.lowering.kernels.target import KernelsTarget

__all__ = ["KernelModel", "KernelsTarget", "lower"]
