"""The ``kernels`` target: a quantized graph as a callable module whose layers are fused low-bit operators.

`lower` makes a `KernelModel` of a graph; `KernelsTarget` says what becomes of a scheme. Every operator is a
``torch.library`` operator of the namespace ``qcompiler_kernels`` with a shape function, a reference (the arithmetic of
quantize and dequantize nodes, any device), a CPU implementation and a CUDA one in Triton.
An operator lives in its own file, with its reference, its layout and its CPU implementation; the Triton kernel in
``<operator>_triton.py`` beside it, with its search space, imported only where it is launched, so that nothing here
needs Triton to be installed.

| file | what |
|---|---|
| ``forms.py`` | what of a graph has a kernel, proved on its nodes |
| ``plan.py``, ``layers.py`` | what becomes of every node, and the module of every linear layer |
| ``rewrite.py``, ``module_values.py`` | the module that is made of it all |
| ``precision.py`` | which dtype its operators run in |
| ``neighbours.py`` | norms, gated activations and rotary embeddings as one launch each |
| ``cached_attention.py`` | attention over caches, for few and for many new tokens |
| ``model.py`` | `KernelModel`: that module with its caches, an artifact |
| ``captured_step.py`` | decoding steps as CUDA graphs |
| ``noise.py`` | how far it may be from its graph |
| ``search.py`` | launch configurations, searched for with its own operators |
| ``target.py`` | `KernelsTarget` |
| ``library.py`` | the namespace |
| ``device.py`` | what an operator asks of the device it runs on, and which implementation it chose |
| ``tuning.py`` | launch configurations: defaults, search, the cache on disk |
| ``machine_code.py`` | kernels compiled ahead of time for a GPU that is not there, and what their instructions are |

| operator | weights, activations, caches | files |
|---|---|---|
| ``weight_only_linear`` | 2, 3, 4, 8 bits; float16, bfloat16 | ``weight_only*.py`` |
| ``scaled_linear`` | INT8, FP8, INT4 in groups; INT8 and FP8 activations | ``scaled_linear*.py`` |
| ``codebook_linear`` | tables of 4 to 16 values and a sparse matrix | ``codebook_*.py`` |
| ``quantize_rows``, ``quantize_static``, ... | activations to codes, behind a norm too | ``quantize_rows*.py`` |
| ``append_quantized``, ``append_static`` | new tokens into a cache | ``cache_*.py`` |
| ``decode_attention`` | over caches in INT8, FP8, INT4 or float | ``decode_attention*.py`` |
| ``rms_norm``, ``gated``, ``rotary`` | what stands between them | files of those names |
"""

from qcompiler.lowering.kernels.model import KernelModel, lower
from qcompiler.lowering.kernels.target import KernelsTarget

__all__ = ["KernelModel", "KernelsTarget", "lower"]
