"""Files of GGUF, which hold a model by themselves: weights, settings and tokenizer.

| file | what |
|---|---|
| ``reader`` | blocks of weights become codes or floats; the file becomes what a directory would be |
| ``config`` | settings become a ``config.json`` |
| ``tokenizer`` | the tokenizer, as the files that transformers loads one from |
| ``models`` | models, tensors and words as GGUF calls them |
"""

from qcompiler.frontend.checkpoints.gguf.models import (
    GGUF_MODELS,
    GGUF_WORDS,
    LLAMA3_FACTORS,
    GGUFModel,
    GGUFPlace,
    gguf_places,
    interleave,
)
from qcompiler.frontend.checkpoints.gguf.reader import OpenedGGUF, find_gguf, open_gguf

__all__ = [
    "GGUF_MODELS",
    "GGUF_WORDS",
    "LLAMA3_FACTORS",
    "GGUFModel",
    "GGUFPlace",
    "OpenedGGUF",
    "find_gguf",
    "gguf_places",
    "interleave",
    "open_gguf",
]
