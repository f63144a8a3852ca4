"""AWQ checkpoints, written in loops from the format's description."""

import shutil

import pytest

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from tests.frontend.checkpoints.comparing import assert_same_model, refused
from tests.frontend.checkpoints.packers import awq_weight, edit_settings, edit_tensors, write_pair

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq_pair(place, *, group=32, symmetric=False, **fields):
    def make(name, rows, columns, generator):
        return awq_weight(rows, columns, generator, group=group, symmetric=symmetric)

    return write_pair(place, make, {**SETTINGS, "group_size": group, **fields})


@pytest.mark.parametrize("group", [32, 16, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_and_zero_points(tmp_path, group, symmetric):
    graph = assert_same_model(awq_pair(tmp_path, group=group, symmetric=symmetric, modules_to_not_convert=["lm_head"]))
    weight = graph.schemes[UP].weight
    assert (weight.dtype, weight.symmetric) == ("int4", symmetric)
    assert weight.group_size == (None if group == -1 else group)


def test_older_names_of_the_settings(tmp_path):
    pair = awq_pair(tmp_path, w_bit=4, q_group_size=32)
    edit_settings(pair.quantized, version="GEMM")
    assert_same_model(pair)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return awq_pair(tmp_path_factory.mktemp("awq"))


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written.quantized, tmp_path / "model")


@pytest.mark.parametrize("bits", [3, 8, "4", None])
def test_bits(directory, bits):
    edit_settings(directory, bits=bits)
    assert refused(directory, UnsupportedModelError, "bits").got == str(bits) or bits is None


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", 2])
def test_other_layouts(directory, version):
    edit_settings(directory, version=version)
    assert refused(directory, UnsupportedModelError, "layout").got == str(version)


@pytest.mark.parametrize("size", [0, "32"])
def test_a_group_size_that_is_none(directory, size):
    edit_settings(directory, group_size=size)
    refused(directory, InputError, "group size")


def test_a_group_size_that_is_not_that_of_the_scales(directory):
    edit_settings(directory, group_size=64)
    assert refused(directory, WeightError, "shape").where.endswith(".scales")


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_a_missing_part(directory, part):
    edit_tensors(directory, lambda tensors: tensors.pop(f"{UP}.{part}"))
    assert refused(directory, WeightError, "lacks a tensor").where == f"{UP}.{part}"


def test_zero_points_of_another_shape(directory):
    edit_tensors(directory, lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:, 1:].contiguous()}))
    error = refused(directory, WeightError, "shape")
    assert (error.where, error.got, error.expected) == (f"{UP}.qzeros", "(2, 11)", "(2, 12)")


@pytest.mark.parametrize("name", ["up_proj", UP])
def test_codes_of_a_layer_that_stays_in_float(directory, name):
    edit_settings(directory, modules_to_not_convert=[name])
    assert refused(directory, WeightError, "leave it in float").where == f"{UP}.qweight"
