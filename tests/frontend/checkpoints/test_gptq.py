"""GPTQ checkpoints, written in loops from the format's description."""

import json
import shutil

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.ir import quantized_tables, with_float_tables
from tests.frontend.checkpoints.comparing import assert_same_model, refused
from tests.frontend.checkpoints.packers import (
    Pair,
    edit_config,
    edit_settings,
    edit_tensors,
    gptq_weight,
    write_pair,
)

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def gptq_pair(place, *, bits=4, group=32, symmetric=True, version=1, g_idx=None) -> Pair:
    def make(name, rows, columns, generator):
        places = None if g_idx is None else g_idx(name, columns, generator)
        options = {"bits": bits, "group": group, "symmetric": symmetric, "version": version, "g_idx": places}
        return gptq_weight(rows, columns, generator, **options)

    layout = "gptq" if version == 1 else "gptq_v2"
    fields = {"bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": layout}
    return write_pair(place, make, {**SETTINGS, **fields})


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_and_zero_points(tmp_path, bits, symmetric, version):
    graph = assert_same_model(gptq_pair(tmp_path, bits=bits, symmetric=symmetric, version=version))
    weight = graph.schemes[UP].weight
    assert (weight.dtype, weight.group_size, weight.symmetric) == (f"int{bits}", 32, symmetric)
    assert graph.weights.info(f"{UP}.weight_codes").dtype == ("" if symmetric else "u") + f"int{bits}"
    assert graph.notes == graph.lost == []


@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_columns(tmp_path, symmetric):
    graph = assert_same_model(gptq_pair(tmp_path, group=-1, symmetric=symmetric))
    assert graph.schemes[UP].weight.granularity == "per_channel"
    assert graph.weights.info(f"{UP}.weight_scale").shape == (96,)


def test_the_last_group_may_be_short(tmp_path):
    assert_same_model(gptq_pair(tmp_path, group=40, symmetric=False))


def shuffled(name, columns, generator):
    """Groups of act-order; the three layers that read one value have one order, as they have one Gram matrix."""
    shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("gate_proj", "up_proj")
    order = np.random.default_rng(len(shared)).permutation(columns)
    places = np.zeros(columns, dtype=np.int64)
    places[order] = np.arange(columns) // 32
    return places


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_selects_columns(tmp_path, symmetric):
    graph = assert_same_model(gptq_pair(tmp_path, symmetric=symmetric, g_idx=shuffled))
    selects = [node for node in graph.fx.nodes if node.target is torch.ops.aten.index_select.default]
    assert len(selects) == 4  # of as many values
    assert graph.schemes[UP].weight.group_size == 32
    onnx = qc.lower(qc.load(tmp_path / "quantized"), "onnx", tmp_path / "onnx")
    assert onnx["parity"]["max_difference"] <= 1e-4


def test_act_order_has_no_checkpoint_form(tmp_path):
    pair = gptq_pair(tmp_path, g_idx=shuffled)
    with pytest.raises(qc.errors.TargetError, match="no place"):
        qc.lower(pair.quantized, "checkpoint", tmp_path / "out")


def test_groups_of_different_sizes_are_float(tmp_path):
    def uneven(name, columns, generator):
        return np.minimum(np.arange(columns) % 3, 1) if name == UP else np.arange(columns) // 32

    graph = assert_same_model(gptq_pair(tmp_path, g_idx=uneven), sites=6)
    assert UP not in graph.schemes
    (note,) = graph.notes
    assert UP in note
    assert "different sizes" in note


def test_the_layout_of_a_kernel(directory):
    edit_settings(directory, is_marlin_format=True)
    assert refused(directory, UnsupportedModelError, "layout").got == "marlin"


def test_a_layer_in_another_format(tmp_path):
    def make(name, rows, columns, generator):
        if name.endswith("o_proj"):
            return None
        return gptq_weight(rows, columns, generator, bits=8 if name.endswith("down_proj") else 4)

    dynamic = {r"-:.*\.o_proj": {}, r"+:.*\.down_proj": {"bits": 8}}
    graph = assert_same_model(write_pair(tmp_path, make, {**SETTINGS, "dynamic": dynamic}), sites=6)
    assert graph.schemes["model.layers.0.mlp.down_proj"].weight.bits == 8


def test_settings_in_a_file_of_their_own(tmp_path):
    pair = gptq_pair(tmp_path)
    fields = {key: value for key, value in SETTINGS.items() if key != "quant_method"}
    edit_config(pair.quantized, quantization_config=None)
    (pair.quantized / "quantize_config.json").write_text(json.dumps(fields))
    assert_same_model(pair)
    (pair.floats / "quantize_config.json").write_text(json.dumps(fields))  # left beside a float model
    assert qc.capture(pair.floats).schemes == {}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return gptq_pair(tmp_path_factory.mktemp("gptq"))


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written.quantized, tmp_path / "model")


@pytest.mark.parametrize("bits", [5, 16, "4", None])
def test_bits(directory, bits):
    edit_settings(directory, bits=bits)
    assert "qweight" in refused(directory, UnsupportedModelError, "bits").where


@pytest.mark.parametrize("layout", ["marlin", "gptq_v3", 2])
def test_other_layouts(directory, layout):
    edit_settings(directory, checkpoint_format=layout)
    assert refused(directory, UnsupportedModelError, "layout").got == str(layout)


def test_bits_that_are_not_those_of_the_codes(directory):
    edit_settings(directory, bits=8, sym=False)
    error = refused(directory, WeightError, "shape")
    assert error.where.endswith("qweight")


def test_a_group_size_that_is_not_that_of_the_scales(directory):
    edit_settings(directory, group_size=16)
    error = refused(directory, WeightError, "shape")
    assert (error.where, error.got, error.expected) == (
        "model.layers.0.mlp.down_proj.scales",
        "(3, 64)",
        "(6, 64)",
    )


@pytest.mark.parametrize("size", [0, -2, "32", True])
def test_a_group_size_that_is_none(directory, size):
    edit_settings(directory, group_size=size)
    refused(directory, InputError, "group size")


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_missing_part(directory, part):
    edit_tensors(directory, lambda tensors: tensors.pop(f"{UP}.{part}"))
    assert refused(directory, WeightError, "lacks a tensor").where == f"{UP}.{part}"


def test_scales_that_are_no_floats(directory):
    edit_tensors(directory, lambda tensors: tensors.update({f"{UP}.scales": tensors[f"{UP}.scales"].int()}))
    assert refused(directory, WeightError, "dtype").got == "int32"


@pytest.mark.parametrize("group", [-1, 2, 1000])
def test_a_group_that_does_not_exist(directory, group):
    def change(tensors):
        tensors[f"{UP}.g_idx"][5] = group

    edit_tensors(directory, change)
    assert refused(directory, WeightError, "does not exist").where == f"{UP}.g_idx"


def test_zero_points_that_contradict_the_settings(directory):
    edit_settings(directory, checkpoint_format="gptq_v2")
    error = refused(directory, WeightError, "contradict")
    assert (error.got, error.expected) == ("7 to 7", "8 (sym)")
    assert error.where.endswith("qzeros")


def test_a_zero_point_that_programs_read_in_two_ways(directory):
    edit_settings(directory, sym=False)
    edit_tensors(directory, lambda tensors: tensors[f"{UP}.qzeros"].fill_(-1))
    assert refused(directory, WeightError, "different ways").where == f"{UP}.qzeros"


def test_codes_of_a_layer_that_stays_in_float(directory):
    edit_settings(directory, dynamic={rf"-:{UP}": {}})
    assert refused(directory, WeightError, "leave it in float").where == f"{UP}.qweight"


def test_a_pattern_that_cannot_be_read(directory):
    edit_settings(directory, dynamic={"+:(": {}})
    refused(directory, InputError, "pattern")


def test_a_layer_of_another_size_than_the_model_has(directory):
    def change(tensors):
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{UP}.{part}"] = tensors[f"model.layers.0.self_attn.q_proj.{part}"].clone()

    edit_tensors(directory, change)
    error = refused(directory, WeightError, r"config\.json implies")
    assert (error.where, error.got, error.expected) == (f"{UP}.weight", "(64, 64)", "(96, 64)")


def put_codes(directory, module, weight):
    """In the place of a float weight."""

    def change(tensors):
        del tensors[f"{module}.weight"]
        parts = {part: tensor.contiguous() for part, tensor in weight.tensors.items()}
        tensors.update({f"{module}.{part}": tensor for part, tensor in parts.items()})

    edit_tensors(directory, change)


def test_codes_of_an_embedding(directory):
    weight = gptq_weight(4096, 64, np.random.default_rng(0))
    put_codes(directory, "model.embed_tokens", weight)
    graph = qc.capture(directory)
    (table,) = quantized_tables(graph)
    assert str(table.spec) == "int4 g32 symmetric"
    found = with_float_tables(graph).weights.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found.numpy(), weight.values)


def test_codes_of_a_norm(directory):
    put_codes(directory, "model.norm", gptq_weight(32, 64, np.random.default_rng(0)))
    error = refused(directory, UnsupportedModelError, "no linear layer, and no embedding")
    assert (error.where, error.got) == ("model.norm", "LlamaRMSNorm")


def test_settings_without_codes(directory, written):
    edit_config(written.floats, quantization_config=SETTINGS)
    refused(written.floats, UnsupportedModelError, "no layer holds codes")
    edit_config(written.floats, quantization_config=None)
