"""``model.gguf``: settings, tokenizer and tensors, one tensor in memory at a time."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompiler.frontend import LLAMA3_FACTORS, interleave
from qcompiler.ir import Graph
from qcompiler.lowering.checkpoint.contents import Contents
from qcompiler.lowering.checkpoint.gguf import architectures, metadata, vocabulary
from qcompiler.lowering.checkpoint.gguf.layout import type_of
from qcompiler.storage import write_errors

if TYPE_CHECKING:
    import gguf

__all__ = ["FILE", "check_model", "save"]

FILE = "model.gguf"
_FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


def check_model(graph: Graph, model: nn.Module) -> None:
    """Refuses a model that has no place in GGUF, or whose tokenizer has none.

    Args:
        graph: captured from it.
        model: on meta.

    Raises:
        TargetError: that says what has none.
    """
    architectures.check_names(model)
    metadata.check_settings(model.config)
    config: Any = model.config
    vocabulary.read_vocabulary(_source(graph), int(config.vocab_size))


def _source(graph: Graph) -> Path:
    return Path(str(graph.provenance["companions"]))


def save(contents: Contents, graph: Graph, model: nn.Module, directory: Path) -> None:
    """Writes the file into a directory.

    Raises:
        TargetError: for a scale that float16 does not hold.
        InputError, ResourceError: if it cannot be written.
    """
    import gguf

    config: Any = model.config
    places = architectures.places_of(contents.store.names(), config)
    order = sorted(places, key=lambda name: _place_in_model(places[name].name))
    kinds = {name: gguf.GGMLQuantizationType[type_of(contents, name)] for name in order}
    factors = metadata.rope_factors(config)
    with write_errors(directory):
        writer = gguf.GGUFWriter(directory / FILE, architectures.architecture_of(config).name)
        try:
            writer.add_name(Path(str(graph.provenance.get("source", "model"))).name)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(contents, kinds))
            metadata.add_settings(writer, config)
            vocabulary.add_vocabulary(writer, _source(graph), int(config.vocab_size))
            if factors is not None:
                writer.add_tensor_info(LLAMA3_FACTORS, tuple(factors.shape), np.dtype(np.float32), 4 * factors.numel())
            for name in order:
                _announce(writer, contents, name, places[name].name, kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for name in order:
                writer.write_tensor_data(_data(contents.store.read(name), places[name].heads, kinds[name]))
        finally:
            writer.close()
    _note(contents, config)


def _announce(
    writer: "gguf.GGUFWriter", contents: Contents, name: str, place: str, kind: "gguf.GGMLQuantizationType"
) -> None:
    import gguf

    info = contents.store.info(name)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = list(info.shape)
    if kind.name not in ("F32", "F16", "BF16"):
        shape[-1] = shape[-1] // size * block
    nbytes = int(np.prod(shape)) // block * size
    writer.add_tensor_info(place, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)


def _data(tensor: Tensor, heads: int | None, kind: "gguf.GGMLQuantizationType") -> np.ndarray[Any, Any]:
    """A tensor as its bytes lie in the file."""
    if heads is not None:
        tensor = interleave(tensor, heads)
    if kind.name == "F32":
        tensor = tensor.float()
    if kind.name == "BF16":
        tensor = tensor.view(torch.int16)
    found: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return found


def _place_in_model(name: str) -> tuple[int, str]:
    """Blocks in their order, behind the embedding; what belongs to none last."""
    parts = name.split(".")
    if parts[0] == "blk":
        return int(parts[1]), name
    return (-1, name) if parts[0] == "token_embd" else (1 << 30, name)


def _file_type(contents: Contents, kinds: dict[str, "gguf.GGMLQuantizationType"]) -> int:
    """What most tensors are, as llama.cpp counts them: those that are matrices."""
    import gguf

    layers = [f"{layer.name}.weight" for layer in contents.layers]
    matrices = layers or [name for name in kinds if len(contents.store.info(name).shape) > 1]
    common = Counter(kinds[name].name for name in matrices).most_common(1)[0][0]
    return int(gguf.LlamaFileType[_FILE_TYPES.get(common, f"MOSTLY_{common}")])


def _note(contents: Contents, config: Any) -> None:
    longest = metadata.context_length(config)
    if longest < config.max_position_embeddings:
        contents.note(
            f"sequences are limited to {longest} tokens, the sliding window of the model, which llama.cpp does not know"
        )
