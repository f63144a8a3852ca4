"""Sizes of models: as told, from headers, from a configuration alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcompiler.advisor import read_shape, told_shape
from qcompiler.errors import InputError
from tests.advisor.models import LLAMA_2_7B, LLAMA_2_70B, MIXTRAL
from tests.tiny_checkpoint import save_checkpoint


def test_parameters_of_published_models() -> None:
    assert told_shape(**LLAMA_2_7B).parameters == 6_738_415_616
    assert told_shape(**LLAMA_2_70B).parameters == 68_976_648_192
    mixtral = told_shape(**MIXTRAL)
    assert mixtral.parameters == 46_702_792_704
    assert mixtral.multiplied / 1e9 == pytest.approx(12.75, abs=0.02)  # active ones, without the embedding
    assert mixtral.in_experts == 32 * 8 * 3 * 4096 * 14336


def test_the_mlp_follows_from_the_parameters() -> None:
    sizes = {key: value for key, value in LLAMA_2_70B.items() if key != "intermediate"}
    assert told_shape(params=68.98e9, **sizes).intermediate == LLAMA_2_70B["intermediate"]
    assert told_shape(params=70e9, layers=80, hidden=8192, kv_heads=8, head_dim=128).heads == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": None}, "sizes of the model are missing"),
        ({"kv_heads": None}, "sizes of the model are missing"),
        ({"heads": None}, "sizes of the model are missing"),
        ({"intermediate": None}, "sizes of the model are missing"),
        ({"layers": 0}, "no size of a model"),
        ({"hidden": -4096}, "no size of a model"),
        ({"hidden": 1 << 30}, "no size of a model"),
        ({"layers": 2.5}, "no size of a model"),
        ({"layers": True}, "no size of a model"),
        ({"kv_heads": 5}, "divide those of queries"),
        ({"experts": 2, "active": 3}, "no more experts"),
        ({"params": 7e20}, "no number of parameters"),
        ({"params": -7e9}, "no number of parameters"),
        ({"params": float("nan")}, "no number of parameters"),
        ({"params": 70e9}, "contradict each other"),
        ({"params": 1e9, "intermediate": None}, "fewer than attention and tables"),
    ],
)
def test_missing_and_absurd_sizes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        told_shape(**{**LLAMA_2_7B, **changes})


def test_headers_give_every_element(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model")
    found = read_shape(directory)
    assert found.parameters == 2 * 4096 * 64 + found.others + sum(
        matrix.elements for matrix in found.matrices if matrix.part in ("attention", "mlp")
    )
    parts = found.to_dict()["parts"]
    assert parts["mlp"] == 2 * 3 * 64 * 96
    assert parts["table"] == parts["head"] == 4096 * 64
    assert found.widths() == (64, 96)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    declared = read_shape(directory)
    assert declared.parameters == found.parameters
    assert "no weights" in declared.source


def _write(directory: Path, tensors: Mapping[str, tuple[int, ...]], **config: Any) -> Path:
    directory.mkdir()
    sizes = {"model_type": "any", "vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps({**sizes, "intermediate_size": 12, **config}))
    if tensors:
        weights = {name: torch.zeros(shape) for name, shape in tensors.items()}
        save_file(weights, directory / "model.safetensors")
    return directory


def test_experts_are_found_by_their_numbers(tmp_path: Path) -> None:
    tensors: dict[str, tuple[int, ...]] = {"embed.weight": (40, 8), "norm.weight": (8,), "shared_gate.0.w": (1, 8)}
    for layer in range(2):
        tensors[f"layers.{layer}.router.weight"] = (3, 8)
        tensors[f"layers.{layer}.attention.weight"] = (8, 8)
        for expert in range(3):
            tensors[f"layers.{layer}.experts.{expert}.up.weight"] = (12, 8)
    found = read_shape(_write(tmp_path / "apart", tensors, num_experts=3, num_experts_per_tok=2))
    assert found.in_experts == 2 * 3 * 12 * 8
    assert found.to_dict()["parts"]["router"] == 2 * 3 * 8
    assert found.others == 16
    dense = 2 * 8 * 8 + 2 * 3 * 8 + 40 * 8  # the head is the embedding
    assert found.multiplied == dense + found.in_experts * 2 // 3
    merged = {name: shape for name, shape in tensors.items() if "experts" not in name}
    merged |= {f"layers.{layer}.experts.up": (3, 8, 12) for layer in range(2)}
    again = read_shape(_write(tmp_path / "merged", merged, num_experts=3, num_experts_per_tok=2))
    assert (again.in_experts, again.multiplied) == (found.in_experts, found.multiplied)


def test_a_table_of_positions_is_no_layer(tmp_path: Path) -> None:
    tensors = {"wte": (40, 8), "wpe": (16, 8), "a.0.w": (8, 8), "a.1.w": (8, 8)}
    assert read_shape(_write(tmp_path / "m", tensors, max_position_embeddings=16)).others == 16 * 8
    square = {"wte": (40, 8), "a.0.w": (8, 8), "a.1.w": (8, 8)}  # as long as wide: Llama-2-7B
    assert read_shape(_write(tmp_path / "square", square, max_position_embeddings=8)).others == 0


def test_windows_and_latents(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    windowed = read_shape(_write(tmp_path / "a", {}, layer_types=kinds, sliding_window=4))
    assert (windowed.cached_layers, windowed.windowed_layers, windowed.window) == (1, 1, 4)
    all_of_them = read_shape(_write(tmp_path / "b", {}, sliding_window=4))
    assert (all_of_them.cached_layers, all_of_them.windowed_layers) == (0, 2)
    unused = read_shape(_write(tmp_path / "c", {}, sliding_window=4, use_sliding_window=False))
    assert unused.cached_layers == 2
    linear = read_shape(_write(tmp_path / "d", {}, layer_types=["linear_attention", "full_attention"]))
    assert (linear.cached_layers, linear.windowed_layers) == (1, 0)
    latent = read_shape(_write(tmp_path / "e", {}, kv_lora_rank=512, qk_rope_head_dim=64))
    assert 2 * latent.kv_heads * latent.head_dim == 576


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, "8"])
def test_a_configuration_without_a_size(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"config\.json lacks a size") as caught:
        read_shape(_write(tmp_path / "m", {}, **{name: value}))
    assert name in str(caught.value.got)


def test_what_is_quantized_already(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn)}
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match="quantized already"):
        read_shape(directory)
