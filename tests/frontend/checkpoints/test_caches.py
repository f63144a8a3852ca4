"""Scales of keys and values in checkpoints, against a cache of transformers that rounds what it is given."""

import shutil

import pytest
import torch
from transformers.cache_utils import DynamicCache

import qcompiler as qc
from qcompiler.artifacts import HFArtifact
from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.ir import CacheFormat, cache_formats
from tests.frontend.checkpoints.comparing import IDS, logits, refused
from tests.frontend.checkpoints.packers import ct_settings, edit_settings, edit_tensors, packed_weight, write_pair
from tests.tiny_checkpoint import command

FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
KEYS, VALUES = (0.004, 0.011), (0.007, 0.002)
LOST = "the cache stays in float"


def scales(kind):
    """By name: of two layers, keys and values."""
    paths = {"compressed-tensors": ("", ""), "modelopt": ("k_proj.", "v_proj.")}[kind]
    found = {}
    for layer, (key, value) in enumerate(zip(KEYS, VALUES, strict=True)):
        attention = f"model.layers.{layer}.self_attn."
        shape = (1,) if kind == "compressed-tensors" else ()
        found[f"{attention}{paths[0]}k_scale"] = torch.full(shape, key)
        found[f"{attention}{paths[1]}v_scale"] = torch.full(shape, value)
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Integer weights of compressed-tensors, and float ones that ModelOpt quantized the cache of alone."""
    integers = ct_settings("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32})
    made = {
        "compressed-tensors": (lambda name, *sizes: packed_weight(*sizes), {**integers, "kv_cache_scheme": FP8}),
        "modelopt": (lambda *_: None, {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}),
    }
    found = {}
    for kind, (make, settings) in made.items():
        found[kind] = write_pair(tmp_path_factory.mktemp(kind), make, settings, layers=2)
        edit_tensors(found[kind].quantized, lambda tensors, kind=kind: tensors.update(scales(kind)))
    return found


@pytest.fixture
def directory(pairs, tmp_path):
    return shutil.copytree(pairs["compressed-tensors"].quantized, tmp_path / "model")


class RoundedCache(DynamicCache):  # type: ignore[misc]
    """Keeps what a cache of 8-bit floats would give back."""

    def update(self, key_states, value_states, layer_idx, *args, **options):
        rounded = [
            (states / scale[layer_idx]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale[layer_idx]
            for states, scale in ((key_states, KEYS), (value_states, VALUES))
        ]
        return super().update(*rounded, layer_idx, *args, **options)


@pytest.mark.parametrize("kind", ["compressed-tensors", "modelopt"])
def test_the_cache_of_the_graph_is_rounded(pairs, kind):
    model = HFArtifact(pairs[kind].floats)._model
    with torch.inference_mode():
        expected = model(input_ids=IDS, past_key_values=RoundedCache(), use_cache=True).logits
        plain = model(input_ids=IDS).logits
    graph = qc.capture(pairs[kind].quantized)
    assert cache_formats(graph) == [CacheFormat("float8_e4m3fn", "static")]
    assert graph.lost == []
    difference = (logits(graph) - expected).abs().max()
    assert (plain - expected).abs().max() > 20 * difference
    assert difference <= 1e-3 * expected.abs().max()


def test_what_it_is_good_for(pairs, tmp_path):
    source = pairs["compressed-tensors"].quantized
    made = command("convert", source, "--to", "onnx", "-o", tmp_path / "out", "--json").result
    assert made["targets"]["onnx"]["parity"]["max_difference"] <= 1e-2
    found = command("generate", source, "--prompt", "the sea", "--max-new-tokens", 4, "--json").result
    assert found["text"]


# --- what is lost -----------------------------------------------------------------------------------------------------


def test_no_scales(directory):
    edit_tensors(directory, lambda tensors: [tensors.pop(name) for name in scales("compressed-tensors")])
    graph = qc.capture(directory)
    assert not cache_formats(graph)
    assert graph.lost == [f"{LOST}: it is to be float8, but no scales are stored (engines take 1)"]


def test_scales_of_one_layer(directory):
    edit_tensors(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.k_scale"))
    graph = qc.capture(directory)
    dtypes = [port.dtype for port in graph.signature.inputs if port.role == "past"]
    assert dtypes == ["float8_e4m3fn", "float8_e4m3fn", "float32", "float8_e4m3fn"]
    assert graph.lost == ["caches stay in float that no scale is stored of, though others are: cache.1.key"]


@pytest.mark.parametrize("fields", [{"num_bits": 8, "type": "int"}, {"dynamic": True, "strategy": "token"}])
def test_formats_that_no_operator_keeps(directory, fields):
    edit_settings(directory, kv_cache_scheme={**FP8, **fields})
    graph = qc.capture(directory)
    assert not cache_formats(graph)
    (lost,) = graph.lost
    assert lost.startswith(f"{LOST}: no operator keeps it as ")


def per_head(directory, count=2):
    """Gives every head a scale of its own, and says so."""
    edit_settings(directory, kv_cache_scheme={**FP8, "strategy": "attn_head"})

    def change(tensors):
        for number, name in enumerate(scales("compressed-tensors")):
            tensors[name] = 0.001 * torch.arange(3.0 + number, 3.0 + number + count).reshape(count, 1, 1)

    edit_tensors(directory, change)


def test_a_scale_for_each_head(pairs, directory):
    per_head(directory)

    class Rounded(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **options):
            rounded = []
            for part, states in enumerate((key_states, value_states)):
                first = 3.0 + 2 * layer_idx + part
                scale = 0.001 * torch.tensor([first, first + 1])[:, None, None]
                rounded.append((states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
            return super().update(*rounded, layer_idx, *args, **options)

    model = HFArtifact(pairs["compressed-tensors"].floats)._model
    with torch.inference_mode():
        expected = model(input_ids=IDS, past_key_values=Rounded(), use_cache=True).logits
    graph = qc.capture(directory)
    assert cache_formats(graph) == [CacheFormat("float8_e4m3fn", "static", per_head=True)]
    assert graph.lost == []
    assert (logits(graph) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_more_scales_than_heads(directory):
    per_head(directory, count=3)
    error = refused(directory, WeightError, "neither one nor one for each head")
    assert (error.where, error.expected) == ("model.layers.0.self_attn.k_scale", "1 or 2 numbers")


def test_scales_that_nothing_speaks_of(directory):
    edit_settings(directory, kv_cache_scheme=None)
    graph = qc.capture(directory)
    assert not cache_formats(graph)
    (lost,) = graph.lost
    assert lost.startswith("scales of a cache that the settings do not speak of")


def test_scales_of_no_cache(directory):
    edit_tensors(directory, lambda tensors: tensors.update({"model.layers.7.self_attn.k_scale": torch.ones(1)}))
    graph = qc.capture(directory)
    assert len(cache_formats(graph)) == 1
    assert graph.lost == ["scales of caches that the graph does not have are left out: model.layers.7.self_attn (keys)"]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_scale_that_is_not_positive(directory, value):
    name = "model.layers.0.self_attn.v_scale"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.full((1,), value)}))
    assert refused(directory, WeightError, "not positive").where == name


def test_a_scheme_with_an_unknown_key(directory):
    edit_settings(directory, kv_cache_scheme={**FP8, "rotation": "hadamard"})
    assert "kv_cache_scheme" in refused(directory, UnsupportedModelError, "newer version").where
