"""From a model to a canonical graph.

In: a Hugging Face directory, an `nn.Module` or an ONNX model. Out: a `Graph` whose norms, attention and layers are one
operator each. `capture` begins, `exporting` traces, `skeleton` and `conversions` bind tensors, `canonicalize` and its
rules recognise. `checkpoints` reads those that are quantized already: their layers become quantized sites. `onnx` reads
ONNX: an interpreter that is traced as any module is.
"""

from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_checkpoint, capture_directory, capture_module
from qcompiler.frontend.checkpoints import (
    GGUF_MODELS,
    GGUF_WORDS,
    LLAMA3_FACTORS,
    GGUFModel,
    GGUFPlace,
    gguf_places,
    interleave,
)
from qcompiler.frontend.conversions import SourceNames, convert_names, source_names
from qcompiler.frontend.directories import (
    fingerprint_directory,
    is_quantized_checkpoint,
    read_config,
    refuse_quantized,
)
from qcompiler.frontend.model_config import declared, declared_positions
from qcompiler.frontend.onnx_files import import_with_onnx
from qcompiler.frontend.pattern import Miss, Rule, apply_rules, expect
from qcompiler.frontend.pattern import replace as replace_call
from qcompiler.frontend.skeleton import build_on_meta, quiet_transformers, tied_names

__all__ = [
    "GGUF_MODELS",
    "GGUF_WORDS",
    "LLAMA3_FACTORS",
    "GGUFModel",
    "GGUFPlace",
    "Miss",
    "Rule",
    "SourceNames",
    "apply_rules",
    "build_on_meta",
    "canonicalize",
    "capture_checkpoint",
    "capture_directory",
    "capture_module",
    "convert_names",
    "declared",
    "declared_positions",
    "expect",
    "fingerprint_directory",
    "gguf_places",
    "import_with_onnx",
    "interleave",
    "is_quantized_checkpoint",
    "quiet_transformers",
    "read_config",
    "refuse_quantized",
    "replace_call",
    "source_names",
    "tied_names",
]
