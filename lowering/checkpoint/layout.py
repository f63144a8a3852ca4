"""What a layout has to tell `CheckpointTarget`: functions, most of which have a plain form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qcompiler.ir import Graph
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.lowering.checkpoint.layers import Layer
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Support

__all__ = ["Layout"]

_FLOAT_TABLES = Support("refused", "float embeddings alone")


@dataclass(frozen=True)
class Layout:
    """How the checkpoints of a library are laid out.

    Attributes:
        supports: what becomes of a layer under a scheme, by its input channels.
        add_layer: adds the tensors of a layer to what is written.
        quantization_config: what ``config.json`` says; None: nothing.
        supports_table: what becomes of a quantized embedding, by its format and channels; by default it is refused.
        ties_codes: whether engines multiply with an embedding of codes, so that a head of the same is not stored.
        add_caches: adds the scales of quantized caches; by default there are none.
        extra_files: what goes into further files of JSON, by their names.
        check_layers: refuses layers, as planned or written, that have no place beside each other.
        check_model: refuses a model (captured, and on meta) that has no place at all.
        save: writes the tensors of what a model (captured, and on meta) came to into a directory; None: as safetensors.
    """

    supports: Callable[[Scheme, int], Support]
    add_layer: Callable[[Contents, Layer], None]
    quantization_config: Callable[[Contents], dict[str, Any] | None] = lambda contents: None
    supports_table: Callable[[QuantSpec, int], Support] = lambda spec, width: _FLOAT_TABLES
    ties_codes: bool = False
    add_caches: Callable[[Contents], None] = lambda contents: None
    extra_files: Callable[[Contents], dict[str, Any]] = lambda contents: {}
    check_layers: Callable[[Sequence[Layer]], None] = lambda layers: None
    check_model: Callable[[Graph, nn.Module], None] = lambda graph, model: None
    save: Callable[[Contents, Graph, nn.Module, Path], None] | None = None
