"""Published quantized checkpoints: their codes and scales as parts of a graph, in the layouts of other libraries.

| file | what |
|---|---|
| ``settings`` | what a directory says of its quantization, and which reader that belongs to |
| ``contents`` | `Checkpoint`: float tensors of the unquantized model, layers with their parts, all read when wanted |
| ``compressed_tensors``, ``ct_schemes``, ``gptq``, ``awq``, ``modelopt``, ``fp8``, ``mxfp4`` | one layout each |
| ``caches`` | scales of keys and values become the graph's cache |
| ``merging`` | layers that transformers puts together are put together as codes |
| ``gguf`` | files of GGUF, which hold a model by themselves |
| ``placing`` | layers become quantized sites of a canonical graph |
"""

from qcompiler.frontend.checkpoints.contents import Checkpoint, Layer
from qcompiler.frontend.checkpoints.gguf import (
    GGUF_MODELS,
    GGUF_WORDS,
    LLAMA3_FACTORS,
    GGUFModel,
    GGUFPlace,
    OpenedGGUF,
    find_gguf,
    gguf_places,
    interleave,
    open_gguf,
)
from qcompiler.frontend.checkpoints.placing import check_linear, place_layers
from qcompiler.frontend.checkpoints.settings import Settings, find_settings, read_checkpoint

__all__ = [
    "GGUF_MODELS",
    "GGUF_WORDS",
    "LLAMA3_FACTORS",
    "Checkpoint",
    "GGUFModel",
    "GGUFPlace",
    "Layer",
    "OpenedGGUF",
    "Settings",
    "check_linear",
    "find_gguf",
    "find_settings",
    "gguf_places",
    "interleave",
    "open_gguf",
    "place_layers",
    "read_checkpoint",
]
