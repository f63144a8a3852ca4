"""Checkpoints of compressed-tensors that contradict themselves, and settings that nothing here reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompiler as qc
from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from tests.frontend.checkpoints.comparing import refused
from tests.frontend.checkpoints.packers import (
    ct_settings,
    edit_config,
    edit_settings,
    edit_tensors,
    packed_weight,
    write_pair,
)

UP = "model.layers.0.mlp.up_proj"
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    settings = ct_settings("pack-quantized", WEIGHTS)
    return write_pair(tmp_path_factory.mktemp("ct"), lambda name, *sizes: packed_weight(*sizes), settings).quantized


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def edit_group(directory, **fields):
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    edit_settings(directory, config_groups={"group_0": {**group, **fields}})


@pytest.mark.parametrize("method", ["qcompiler", "", None, [], {"a": 1}, 4])
def test_methods_that_are_not_read(directory, method):
    edit_settings(directory, quant_method=method)
    error = refused(directory, UnsupportedModelError, "quantized already")
    assert error.where.endswith("config.json: quantization_config")


@pytest.mark.parametrize("settings", [[], "gptq", 4])
def test_settings_that_are_no_object(directory, settings):
    edit_config(directory, quantization_config=settings)
    refused(directory, InputError, "not an object")


@pytest.mark.parametrize("text", ["{", "[]", b"\xff"])
def test_a_broken_file_of_settings(directory, text):
    edit_config(directory, quantization_config=None)
    (directory / "quantize_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(directory, InputError, "cannot be read|not an object")


def test_settings_under_their_older_name(directory):
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config=None, compression_config=settings)
    assert len(qc.capture(directory).schemes) == 7


@pytest.mark.parametrize("version", ["1.0.0", "12", "dev"])
def test_a_newer_version(directory, version):
    edit_settings(directory, version=version)
    assert refused(directory, UnsupportedModelError, "newer version").got == version


def test_the_version_of_the_library(directory):
    edit_settings(directory, version="0.20.1")
    assert len(qc.capture(directory).schemes) == 7


def test_a_key_that_is_not_known(directory):
    edit_group(directory, weights={**WEIGHTS, "rotation": "hadamard"})
    error = refused(directory, UnsupportedModelError, "newer version")
    assert (error.got, "group_0.weights" in error.where) == ("rotation", True)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 9},
        {"num_bits": 1},
        {"num_bits": "4"},
        {"type": "complex"},
        {"strategy": "attn_head"},
        {"group_size": 0},
        {"group_size": None},
        {"strategy": "block", "block_structure": None},
        {"strategy": "block", "block_structure": [32, 32]},
        {"strategy": "tensor"},
        {"strategy": "token"},
        {"dynamic": True},
        {"dynamic": "often"},
        {"type": "float"},
    ],
)
def test_formats_that_are_not_read(directory, changes):
    edit_group(directory, weights={**WEIGHTS, **changes})
    error = refused(directory, UnsupportedModelError, "not read")
    assert "group_0" in error.where or "proj" in error.where


@pytest.mark.parametrize("layout", ["marlin-24", "dense", "sparse-bitmask", "mxfp8-quantized", "int-quantized", None])
def test_layouts_that_are_not_read(directory, layout):
    edit_group(directory, format=layout)
    edit_settings(directory, format=layout)
    refused(directory, (UnsupportedModelError, WeightError), "not read|lacks a tensor")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"output_activations": WEIGHTS}, "outputs"),
        ({"weights": None, "input_activations": WEIGHTS}, "float weights"),
        ({"targets": None}, "spelled out"),
    ],
)
def test_groups_that_are_not_read(directory, fields, match):
    edit_group(directory, **fields)
    refused(directory, UnsupportedModelError, match)


@pytest.mark.parametrize("groups", [None, {}, [], {"W4A16": ["Linear"]}])
def test_no_groups(directory, groups):
    edit_settings(directory, config_groups=groups)
    refused(directory, (InputError, UnsupportedModelError), "config_groups|spelled out")


@pytest.mark.parametrize("key", ["transform_config", "sparsity_config"])
def test_parts_that_are_not_read(directory, key):
    edit_settings(directory, **{key: {"format": "sparse-24"}})
    assert refused(directory, UnsupportedModelError, "not read").where.endswith(key)


@pytest.mark.parametrize("names", ["lm_head", 4, [3], {"a": 1}])
def test_lists_of_names_that_are_none(directory, names):
    edit_settings(directory, ignore=names)
    refused(directory, InputError, "list of names")
    edit_settings(directory, ignore=[])
    edit_group(directory, targets=names)
    refused(directory, InputError, "list of names")


@pytest.mark.parametrize("fields", [{"ignore": ["lm_head", UP]}, {"ignore": ["re:.*up_proj"]}])
def test_codes_of_a_layer_that_stays_in_float(directory, fields):
    edit_settings(directory, **fields)
    assert refused(directory, WeightError, "leave it in float").where.startswith(UP)


def test_codes_of_a_layer_that_no_group_names(directory):
    edit_group(directory, targets=["re:.*self_attn.*"])
    assert ".mlp." in refused(directory, WeightError, "leave it in float").where


def test_a_pattern_that_cannot_be_read(directory):
    edit_settings(directory, ignore=["re:("])
    refused(directory, InputError, "pattern")


@pytest.mark.parametrize("part", ["weight_scale", "weight_packed", "weight_shape"])
def test_a_missing_part(directory, part):
    edit_tensors(directory, lambda tensors: tensors.pop(f"{UP}.{part}"))
    assert refused(directory, WeightError, "lacks a tensor").where == f"{UP}.{part}"


def test_a_missing_zero_point(directory):
    edit_group(directory, weights={**WEIGHTS, "symmetric": False})
    assert refused(directory, WeightError, "lacks a tensor").where.endswith(".weight_zero_point")


@pytest.mark.parametrize("shape", [[96, 32], [64, 64], [-1, 64], [96, 10**12]])
def test_a_shape_that_contradicts_the_codes(directory, shape):
    edit_tensors(directory, lambda tensors: tensors.update({f"{UP}.weight_shape": torch.tensor(shape)}))
    assert refused(directory, WeightError, "shape").where == f"{UP}.weight_packed"


def test_a_shape_that_contradicts_the_model(directory):
    def change(tensors):
        tensors[f"{UP}.weight_shape"] = torch.tensor([96, 63])
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"]

    edit_tensors(directory, change)
    error = refused(directory, WeightError, r"config\.json implies")
    assert (error.where, error.got) == (f"{UP}.weight", "(96, 63)")


def test_scales_of_another_shape(directory):
    edit_tensors(directory, lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:, :1].contiguous()}))
    error = refused(directory, WeightError, "shape")
    assert (error.where, error.got, error.expected) == (f"{UP}.weight_scale", "(96, 1)", "(96, 2)")


def test_scales_that_are_not_finite(directory):
    edit_tensors(directory, lambda tensors: tensors[f"{UP}.weight_scale"][3].fill_(float("nan")))
    with pytest.raises(WeightError, match="finite") as caught:
        qc.open_artifact(directory).forward(torch.arange(4)[None])
    assert UP in caught.value.where


def test_a_truncated_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(directory, WeightError, "truncated")
    with pytest.raises(WeightError, match="truncated"):
        qc.open_artifact(directory)


def test_a_truncated_shard(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = {files[0]: names[: len(names) // 2], files[1]: names[len(names) // 2 :]}
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(qc.capture(directory).schemes) == 7
    path = directory / files[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert files[1] in refused(directory, WeightError, "truncated").where


def test_nothing_is_compiled_from_it(directory):
    for model in (directory, qc.capture(directory)):
        with pytest.raises(UnsupportedModelError, match="quantized already") as caught:
            qc.compile(model, "w4a16-rtn")
        assert caught.value.got == "compressed-tensors"
        assert "convert" in caught.value.remedy
