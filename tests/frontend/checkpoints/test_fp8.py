"""Checkpoints of ``quant_method: fp8``, written from the format's description and loaded by transformers itself."""

import shutil

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import NativeArtifact
from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from tests.frontend.checkpoints.comparing import IDS, assert_rounded_model, assert_same_model, refused, round_in_groups
from tests.frontend.checkpoints.packers import Weight, edit_settings, edit_tensors, expand, plain_weight, write_pair

UP = "model.layers.0.mlp.up_proj"
BLOCKS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [32, 32],
    "modules_to_not_convert": ["lm_head"],
}


def block_weight(name, rows, columns, generator):
    found = plain_weight(rows, columns, generator, kind="float8", strategy="block")
    return Weight({"weight": found.tensors["weight"], "weight_scale_inv": found.tensors["weight_scale"]}, found.values)


def power_weight(name, rows, columns, generator, *, side=32, dtype=torch.float8_e8m0fnu):
    """Blocks of ``side`` rows, 32 columns, with a power of two each in one byte."""
    codes = torch.from_numpy(generator.normal(0, 100, (rows, columns))).to(torch.float8_e4m3fn)
    stored = torch.from_numpy(generator.integers(113, 118, (rows // side, columns // 32))).to(torch.uint8)
    sizes = expand(2.0 ** (stored.numpy().astype(int) - 127), 32, columns).repeat(side, axis=0)
    return Weight(
        {"weight": codes, "weight_scale_inv": stored.view(dtype)}, (codes.float().numpy() * sizes).astype("f4")
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("fp8"), block_weight, BLOCKS)


@pytest.fixture
def directory(pair, tmp_path):
    return shutil.copytree(pair.quantized, tmp_path / "model")


def test_blocks(pair):
    graph = assert_rounded_model(pair, round_in_groups(32))
    assert str(graph.schemes[UP].weight) == "float8_e4m3fn 32x32 blocks"
    assert str(graph.schemes[UP].activation) == "float8_e4m3fn g32 dynamic"
    assert graph.lost == []


def test_blocks_at_the_end_are_smaller(tmp_path):
    """Widths of 64 and 96 are no multiple of 128: one block, whose scale is that of all."""

    def make(name, rows, columns, generator):
        found = plain_weight(rows, columns, generator, kind="float8", strategy="tensor")
        scale = found.tensors["weight_scale"].reshape(1, 1)
        return Weight({"weight": found.tensors["weight"], "weight_scale_inv": scale}, found.values)

    pair = write_pair(tmp_path, make, {**BLOCKS, "weight_block_size": [128, 128]})
    graph = assert_rounded_model(pair, round_in_groups(128))
    assert graph.schemes[UP].weight.group_size == 128


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_two(tmp_path, dtype):
    make = lambda *sizes: power_weight(*sizes, dtype=dtype)  # noqa: E731
    graph = assert_same_model(write_pair(tmp_path, make, {**BLOCKS, "scale_fmt": "ue8m0"}))
    (lost,) = graph.lost
    assert lost.startswith("inputs stay in float, since no operator takes powers of two")


def test_blocks_of_one_row(tmp_path):
    make = lambda *sizes: power_weight(*sizes, side=1)  # noqa: E731
    settings = {**BLOCKS, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    graph = assert_same_model(write_pair(tmp_path, make, settings))
    assert str(graph.schemes[UP].weight) == "float8_e4m3fn g32"


@pytest.mark.parametrize("names", [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")])
def test_one_scale_and_a_static_input(tmp_path, names):
    def make(name, rows, columns, generator):
        found = plain_weight(rows, columns, generator, kind="float8", strategy="tensor")
        scale = found.tensors["weight_scale"].reshape(())
        tensors = {"weight": found.tensors["weight"], names[0]: scale, names[1]: torch.tensor(0.02)}
        return Weight(tensors, found.values)

    def round_input(name, x):
        return (x / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.02

    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    graph = assert_rounded_model(write_pair(tmp_path, make, settings), round_input)
    assert graph.lost == []


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_transformers_makes_of_it(pair, monkeypatch):
    """Its own loading, dequantized; on a CPU that needs nothing of the package it asks for."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(pair.quantized, **options)
    torch.nn.Module.float(model)  # what it did not dequantize is in bfloat16, as stored
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits.float()
    found = NativeArtifact(qc.capture(pair.quantized), round_activations=False).forward(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [[128], 128, "128x128", [0, 128], [-1, -1], [32.0, 32.0]])
def test_sizes_of_blocks_that_are_none(directory, block):
    edit_settings(directory, weight_block_size=block)
    assert refused(directory, InputError, "size of blocks").where.endswith("weight_block_size")


@pytest.mark.parametrize(
    "fields", [{"weight_block_size": [32, 64]}, {"activation_scheme": "sometimes"}, {"scale_fmt": "e5m2"}]
)
def test_forms_that_are_not_read(directory, fields):
    edit_settings(directory, **fields)
    assert refused(directory, UnsupportedModelError, "not read").where.endswith(next(iter(fields)))


@pytest.mark.parametrize("damage", ["gone", "shape", "dtype", "weight", "kept"])
def test_tensors_that_contradict_the_settings(directory, damage):
    name = f"{UP}.weight_scale_inv"

    def change(tensors):
        if damage == "gone":
            tensors.pop(name)
        elif damage == "weight":
            tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].float()
        elif damage != "kept":
            tensors[name] = torch.ones(2, 2) if damage == "shape" else tensors[name].to(torch.int32)

    edit_tensors(directory, change)
    if damage == "kept":
        edit_settings(directory, modules_to_not_convert=[UP])
    where = refused(directory, WeightError, "lacks|shape|dtype|leave it in float").where
    assert where == (f"{UP}.weight" if damage in ("weight", "kept") else name)
