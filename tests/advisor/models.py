"""Sizes of published models, as their configurations have them."""

from typing import Any

LLAMA_2_7B: dict[str, Any] = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 32,
    "intermediate": 11008,
    "vocab": 32000,
}
LLAMA_2_13B: dict[str, Any] = {
    **LLAMA_2_7B,
    "layers": 40,
    "hidden": 5120,
    "heads": 40,
    "kv_heads": 40,
    "intermediate": 13824,
}
LLAMA_30B: dict[str, Any] = {
    **LLAMA_2_7B,
    "layers": 60,
    "hidden": 6656,
    "heads": 52,
    "kv_heads": 52,
    "intermediate": 17920,
}
LLAMA_2_70B: dict[str, Any] = {
    **LLAMA_2_7B,
    "layers": 80,
    "hidden": 8192,
    "heads": 64,
    "kv_heads": 8,
    "intermediate": 28672,
}
LLAMA_3_8B: dict[str, Any] = {**LLAMA_2_7B, "kv_heads": 8, "intermediate": 14336, "vocab": 128256}
LLAMA_3_1B: dict[str, Any] = {
    **LLAMA_3_8B,
    "layers": 16,
    "hidden": 2048,
    "head_dim": 64,
    "intermediate": 8192,
    "tied": True,
}
MIXTRAL: dict[str, Any] = {**LLAMA_3_8B, "vocab": 32000, "experts": 8, "active": 2}
