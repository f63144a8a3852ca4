"""A tiny Llama with a tokenizer and a chat template, what is compiled of it, and damage to what is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.lowering.checkpoint import CheckpointTarget
from tests.lowering.checkpoint.conftest import compiled, passes_of
from tests.models import build

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-engines"
DAMAGED = "model.layers.1.mlp.up_proj"
_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def save_model(directory: Path) -> Path:
    """Hidden 128, intermediate 256, two layers, the shipped tokenizer; weights of a size that keeps rounding small."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    others: dict[str, Any] = {"vocab_size": 4096, "head_dim": 64, "initializer_range": 0.06}
    model: Any = build("llama", layers=2, max_position_embeddings=256, **sizes, **ids, **others)
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "booklm" / name, directory / name)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": _TEMPLATE}))
    return directory


def write(graph: Any, layout: str, scheme: str, directory: Path) -> CompileResult:
    """Compiles, and writes ``native`` and ``checkpoint``."""
    target = CheckpointTarget(layout)  # type: ignore[arg-type]
    result = compiled(graph, passes_of(scheme), f"checkpoint:format={layout}")
    result.save(directory / "native")
    qc.lower(result, target, directory / "checkpoint", verify=False)
    return result


def flip_codes(directory: Path) -> None:
    """Bits of a quarter of the codes of one layer."""

    def flip(codes: Tensor) -> None:
        whole = codes.view(torch.uint8)
        whole[: len(whole) // 4] ^= 0x44

    _change(directory, ("weight_packed", "qweight", "weight"), flip)


def double_scales(directory: Path) -> None:
    """Every other scale of one layer."""
    _change(directory, ("weight_scale", "scales"), lambda scales: scales.view(-1)[::2].mul_(2))


def move_zero_points(directory: Path) -> None:
    """Every other word of zero points of one layer."""
    _change(directory, ("weight_zero_point", "qzeros"), lambda zeros: zeros.view(-1)[::2].bitwise_xor_(0x22222222))


def _change(directory: Path, kinds: tuple[str, ...], change: Callable[[Tensor], object]) -> None:
    """Changes in place the first of the tensors that a checkpoint has."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(next(tensors[f"{DAMAGED}.{kind}"] for kind in kinds if f"{DAMAGED}.{kind}" in tensors))
    save_file(tensors, path, {"format": "pt"})


def flip_blocks(directory: Path) -> None:
    """Flips bits in the codes of a tensor of a GGUF."""
    import gguf

    path = directory / "model.gguf"
    (tensor,) = (item for item in gguf.GGUFReader(path).tensors if item.name == "blk.1.ffn_up.weight")
    content = bytearray(path.read_bytes())
    start, size = int(tensor.data_offset), int(tensor.n_bytes)
    for place in range(start + 8, start + size, 18):  # beyond the two bytes of a scale, mostly
        content[place] ^= 0x44
    path.write_bytes(content)
