"""One tiny Llama as GGUF, by another writer than ours, and what of it is changed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

WIDTH, HEADS, WORDS = 64, 4, 61
SETTINGS = {
    "block_count": 1,
    "vocab_size": WORDS,
    "context_length": 48,
    "embedding_length": WIDTH,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 16,
}
SHAPES = {
    "token_embd": (WORDS, WIDTH),
    "output": (WORDS, WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (32, WIDTH),
    "blk.0.attn_v": (32, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (96, WIDTH),
    "blk.0.ffn_up": (96, WIDTH),
    "blk.0.ffn_down": (WIDTH, 96),
    "output_norm": (WIDTH,),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.ffn_norm": (WIDTH,),
}
MakeFile = Callable[..., Path]


def tensors(kinds: Mapping[str, Kind], without: str = "") -> dict[str, tuple[np.ndarray, Kind]]:
    """Random data by name: blocks as bytes."""
    generator = np.random.default_rng(3)
    found = {}
    for name, shape in SHAPES.items():
        values = generator.standard_normal(shape).astype(np.float32) * 0.3
        kind = kinds.get(name, Kind.F32)
        if name != without:
            found[f"{name}.weight"] = (values if kind == Kind.F32 else gguf.quantize(values, kind), kind)
    return found


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Writes a file; ``kinds`` by the names of tensors, settings and architecture as they are given."""

    def made(name: str = "x.gguf", **options: Any) -> Path:
        architecture = options.get("architecture", "llama")
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in {**SETTINGS, **options.get("settings", {})}.items():
            if value is not None:
                adder = writer.add_string if isinstance(value, str) else writer.add_uint32
                adder(f"{architecture}.{key}", value)
        writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
        for tensor, (data, kind) in tensors(options.get("kinds", {}), options.get("without", "")).items():
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return made
