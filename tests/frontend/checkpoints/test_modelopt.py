"""Checkpoints of ModelOpt, written in loops from the format's description."""

import json
import shutil

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import HFArtifact
from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from tests.frontend.checkpoints.comparing import (
    assert_rounded_model,
    assert_same_model,
    assert_same_parts,
    logits,
    refused,
    round_in_groups,
    rounded_reference,
)
from tests.frontend.checkpoints.packers import (
    Weight,
    edit_config,
    edit_settings,
    edit_tensors,
    expand,
    fp4_weight,
    mxfp8_weight,
    plain_weight,
    some_scales,
    write_pair,
)
from tests.lowering.checkpoint.conftest import compiled, passes_of
from tests.tiny_checkpoint import command, save_checkpoint

UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
DOWN = "model.layers.0.mlp.down_proj"
INPUT = 0.02


def settings_of(algorithm, **fields):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **fields}


def eight_bits(algorithm):
    kinds = {"FP8": ("float8", "tensor"), "FP8_PER_CHANNEL_PER_TOKEN": ("float8", "channel")}
    kind, strategy = kinds.get(algorithm, ("int8", "channel"))

    def make(name, rows, columns, generator):
        found = plain_weight(rows, columns, generator, kind=kind, strategy=strategy)
        scale = found.tensors["weight_scale"]
        found.tensors["weight_scale"] = scale.reshape(() if strategy == "tensor" else (rows,))
        if algorithm != "FP8_PER_CHANNEL_PER_TOKEN":
            found.tensors["input_scale"] = torch.tensor(INPUT)
        return found

    return make


def blocks(rows, columns, generator, *, with_axes=True):
    """E4M3 in squares of 128."""
    shape = -(-rows // 128), -(-columns // 128)
    codes = torch.from_numpy(generator.normal(0, 100, (rows, columns))).to(torch.float8_e4m3fn)
    scales = some_scales(generator, *shape, dtype=torch.float32) / 16
    values = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            values[row, column] = float(codes[row, column]) * float(scales[row // 128, column // 128])
    stored = scales.reshape(shape[0], 1, shape[1], 1) if with_axes else scales
    return Weight({"weight": codes, "weight_scale": stored}, values)


def nv_floats(rows, columns, generator, *, with_input=False):
    """The names of compressed-tensors for the same codes, changed; its scale of a tensor is a divisor."""
    found = fp4_weight(rows, columns, generator, nv=True)
    parts = found.tensors
    tensors = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
    tensors["weight_scale_2"] = (1 / parts["weight_global_scale"]).reshape(())
    if with_input:
        tensors["input_scale"] = torch.tensor(4.0 / (448 * 6))
    return Weight(tensors, found.values)


def int4_weight(rows, columns, generator, *, group=32, multiplier=None):
    """Two output channels to a byte, the even one low; ``multiplier`` belongs to the input."""
    codes = generator.integers(-8, 8, (rows, columns))
    packed = np.zeros((rows // 2, columns), np.uint8)
    for row in range(rows):
        for column in range(columns):
            packed[row // 2, column] |= (int(codes[row, column]) & 15) << (4 * (row % 2))
    scales = some_scales(generator, rows, columns // group, dtype=torch.float32)
    values = codes * expand(scales.numpy(), group, columns)
    tensors = {"weight": torch.from_numpy(packed), "weight_scale": scales}
    if multiplier is not None:
        tensors["pre_quant_scale"] = torch.from_numpy(multiplier).to(torch.bfloat16)
        values = values * tensors["pre_quant_scale"].float().numpy()
    return Weight(tensors, values.astype(np.float32))


@pytest.mark.parametrize(
    ("algorithm", "make", "spec"),
    [
        ("MXFP8", mxfp8_weight, "float8_e4m3fn g32"),
        ("W4A16_NVFP4", nv_floats, "float4_e2m1 g16 E4M3 scales"),
        ("W4A16_AWQ", int4_weight, "int4 g32 symmetric"),
        ("INT4_AWQ", int4_weight, "int4 g32 symmetric"),
    ],
)
def test_weights(tmp_path, algorithm, make, spec):
    pair = write_pair(tmp_path, lambda name, *sizes: make(*sizes), settings_of(algorithm))
    graph = assert_same_model(pair)
    assert str(graph.schemes[UP].weight) == spec
    assert graph.schemes[UP].activation is None
    assert len(graph.lost) == (algorithm == "MXFP8")


@pytest.mark.parametrize(
    ("name_of_scale", "with_axes"), [("weight_scale", True), ("weight_scale", False), ("weight_scale_inv", False)]
)
def test_blocks(tmp_path, name_of_scale, with_axes):
    def make(name, *sizes):
        found = blocks(*sizes, with_axes=with_axes)
        found.tensors[name_of_scale] = found.tensors.pop("weight_scale")
        return found

    graph = assert_rounded_model(write_pair(tmp_path, make, settings_of("FP8_PB_WO")), round_in_groups(128))
    assert str(graph.schemes[UP]) == "float8_e4m3fn 128x128 blocks, activation float8_e4m3fn g128 dynamic"
    assert graph.lost == []


def static(largest, dtype=None):
    def rounded(name, x):
        codes = (x / INPUT).clamp(-448, 448).to(dtype).float() if dtype else torch.round(x / INPUT).clamp(-128, 127)
        return codes * INPUT

    return rounded


def per_token(name, x):
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(
    ("algorithm", "round_input"),
    [
        ("FP8", static(448, torch.float8_e4m3fn)),
        ("FP8_PER_CHANNEL_PER_TOKEN", per_token),
        ("W8A8_SQ_PER_CHANNEL", static(127)),
    ],
)
def test_inputs_of_eight_bits(tmp_path, algorithm, round_input):
    pair = write_pair(tmp_path, eight_bits(algorithm), settings_of(algorithm))
    graph = assert_rounded_model(pair, round_input)
    assert graph.schemes[UP].activation.bits == 8
    assert not graph.lost


@pytest.mark.parametrize("algorithm", ["NVFP4", "NVFP4_AWQ"])
def test_inputs_of_nvfp4(tmp_path, algorithm):
    make = lambda name, *sizes: nv_floats(*sizes, with_input=True)  # noqa: E731

    def round_input(name, x):
        factor, parts = 4.0 / (448 * 6), x.unflatten(-1, (-1, 16))
        local = (parts.abs().amax(-1, keepdim=True) / 6 / factor).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = grid[((parts / (local * factor)).abs()[..., None] - grid).abs().argmin(-1)]
        return (nearest * parts.sign() * local * factor).flatten(-2)

    settings = settings_of(algorithm, group_size=16)
    assert assert_rounded_model(write_pair(tmp_path, make, settings), round_input).schemes[UP].activation.has_factor


# --- what inputs are multiplied by ------------------------------------------------------------------------------------


def multiplied_pair(place):
    """Up and gate have one vector, down another one, attention none."""
    shared = np.random.default_rng(3).uniform(0.5, 2, 64).astype(np.float32)

    def make(name, rows, columns, generator):
        own = generator.uniform(0.5, 2, columns).astype(np.float32) if name == DOWN else None
        return int4_weight(rows, columns, generator, multiplier=shared if name in (UP, GATE) else own)

    return write_pair(place, make, settings_of("W4A16_AWQ", group_size=32, pre_quant_scale=True))


def test_inputs_are_multiplied_once_for_all_that_read_them(tmp_path):
    graph = assert_same_model(multiplied_pair(tmp_path))
    names = {str(node.args[1]) for node in graph.fx.nodes if node.target is torch.ops.aten.mul.Tensor}
    assert sum(name.endswith("input_multiplier") for name in names) == 2
    assert not graph.lost


def test_multiplied_inputs_are_rounded_behind(tmp_path):
    vector = np.random.default_rng(3).uniform(0.5, 2, 64).astype(np.float32)

    def make(name, rows, columns, generator):
        found = eight_bits("W8A8_SQ_PER_CHANNEL")(name, rows, columns, generator)
        if columns != 64:
            return found
        found.tensors["pre_quant_scale"] = torch.from_numpy(vector.copy())
        return Weight(found.tensors, found.values)

    def round_input(name, x):
        return static(127)(name, x * torch.from_numpy(vector) if x.shape[-1] == 64 else x)

    pair = write_pair(tmp_path, make, settings_of("W8A8_SQ_PER_CHANNEL"))
    expected = rounded_reference(pair.floats, round_input)
    assert (logits(qc.capture(pair.quantized)) - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_multiplied_inputs_reach_other_targets_or_are_refused(tmp_path):
    pair = multiplied_pair(tmp_path)
    made = command("convert", pair.quantized, "--to", "onnx", "-o", tmp_path / "onnx", "--json").result
    assert made["targets"]["onnx"]["parity"]["max_difference"] <= 1e-4
    error = command("convert", pair.quantized, "--to", "checkpoint", "-o", tmp_path / "ct", "--json").error
    assert "input_multiplier" in error["where"]
    assert not (tmp_path / "ct").exists()


# --- our own writer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    ["fp8-tensor", "nvfp4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8-dynamic", "w4a16-g32"))],
)
def test_it_is_compressed_tensors_and_back(tmp_path, scheme):
    """Codes, scales of weights and of inputs are the same in all three; a factor is stored inverted in one."""
    graph = qc.capture(save_checkpoint(tmp_path / "source", layers=1))
    native = compiled(graph, passes_of(scheme, {"lm_head": None}), "checkpoint:format=modelopt")
    qc.lower(native, "checkpoint", tmp_path / "first", format="modelopt")
    found = [native.graph, qc.capture(tmp_path / "first")]
    last = tmp_path / "first"
    for layout in ("compressed-tensors", "modelopt"):
        place = tmp_path / layout
        assert command("convert", last, "--to", f"checkpoint:format={layout}", "-o", place, "--json").result
        last = place / "checkpoint"
        found.append(qc.capture(last))
        assert found[-1].provenance["checkpoint"] == layout
    for other in found[1:]:
        assert_same_parts(native.graph, other)
        torch.testing.assert_close(logits(other), logits(native.graph), rtol=1e-5, atol=1e-4)
        scales = [name for name in native.graph.weight_names() if name.endswith("input_scale")]
        assert len([name for name in other.weight_names() if name.endswith("input_scale")]) == len(scales)
    assert bool(scales) == (scheme in ("fp8-tensor", "nvfp4"))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("modelopt"), eight_bits("FP8"), settings_of("FP8")).quantized


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def write_beside(directory, **fields):
    """``hf_quant_config.json``."""
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **fields}
    found = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(found))


def test_settings_in_their_own_file(directory):
    expected = logits(qc.capture(directory))
    write_beside(directory)
    assert len(qc.capture(directory).schemes) == 7
    edit_config(directory, quantization_config=None)
    torch.testing.assert_close(logits(qc.capture(directory)), expected, rtol=0, atol=0)


def test_a_file_of_settings_beside_a_float_model(tmp_path):
    pair = write_pair(tmp_path, lambda name, *sizes: None, {})
    edit_config(pair.quantized, quantization_config=None)
    write_beside(pair.quantized)
    assert not qc.capture(pair.quantized).schemes


@pytest.mark.parametrize("fields", [{"quant_library": "modelopt"}, {"quant_method": "modelopt_fp4"}])
def test_other_spellings(directory, fields):
    edit_config(directory, quantization_config={"quant_algo": "FP8", "ignore": ["lm_head"], **fields})
    assert len(qc.capture(directory).schemes) == 7


def test_layers_of_several_algorithms(tmp_path):
    def make(name, rows, columns, generator):
        if name.endswith("o_proj"):
            return None
        if ".mlp." in name:
            return nv_floats(rows, columns, generator)
        return int4_weight(rows, columns, generator)

    layers = {f"model.layers.0.self_attn.{x}_proj": {"quant_algo": "W4A16_AWQ", "group_size": 32} for x in "qkv"}
    layers["model.layers.0.mlp.*"] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    settings = settings_of("MIXED_PRECISION", quantized_layers=layers)
    graph = assert_same_model(write_pair(tmp_path, make, settings), sites=6)
    assert graph.schemes[UP].weight.has_factor
    assert graph.schemes["model.layers.0.self_attn.q_proj"].weight.dtype == "int4"


@pytest.mark.parametrize("fields", [{"quant_algo": "NVFP4"}, {"kv_cache_quant_algo": "INT8"}, {"group_size": 32}])
def test_two_files_that_contradict_each_other(directory, fields):
    edit_settings(directory, kv_cache_scheme={"num_bits": 8, "type": "float"}, group_size=16)
    write_beside(directory, **fields)
    (key,) = fields
    error = refused(directory, InputError, "contradict")
    assert (error.where.endswith(f"hf_quant_config.json: {key}"), error.got) == (True, str(fields[key]))


def test_another_method_in_the_other_file(directory):
    edit_settings(directory, quant_method="awq")
    write_beside(directory)
    assert refused(directory, InputError, "contradict").where.endswith("hf_quant_config.json")


@pytest.mark.parametrize("text", ["{", "[]", b"\xff", '{"quantization": []}'])
def test_a_broken_file(directory, text):
    (directory / "hf_quant_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(directory, InputError, "cannot be read|not an object")


@pytest.mark.parametrize("algorithm", ["W4A8_AWQ", "FP4", "", 8, {"a": 1}])
def test_algorithms_that_are_not_read(directory, algorithm):
    edit_settings(directory, quant_algo=algorithm)
    assert refused(directory, UnsupportedModelError, "not read").got == str(algorithm)


@pytest.mark.parametrize("layers", [None, [], {"a": "FP8"}, {"model.layers.0.mlp.*": {"quant_algo": "FP8"}}])
def test_layers_that_no_algorithm_is_named_for(directory, layers):
    edit_settings(directory, quant_algo="MIXED_PRECISION", quantized_layers=layers)
    refused(directory, (InputError, WeightError), "by name|leave it in float")


@pytest.mark.parametrize("pattern", [UP, "*up_proj", "model.layers.0.mlp*"])
def test_codes_of_a_layer_that_stays_in_float(directory, pattern):
    edit_settings(directory, ignore=["lm_head", pattern])
    assert ".mlp." in refused(directory, WeightError, "leave it in float").where


@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("damage", ["gone", "many", "codes", "zero"])
def test_scales(directory, part, damage):
    name = f"{UP}.{part}"
    found = {"many": torch.ones(3), "codes": torch.ones((), dtype=torch.int8), "zero": torch.zeros(())}

    def change(tensors):
        if damage == "gone":
            tensors.pop(name)
        else:
            tensors[name] = found[damage]

    edit_tensors(directory, change)
    if (part, damage) == ("weight_scale", "zero"):
        assert qc.capture(directory).schemes
    else:
        assert refused(directory, WeightError, "lacks|shape|dtype|positive").where == name


@pytest.mark.parametrize("group", [32, "16", -1, 0.5])
def test_groups_of_another_size(tmp_path, group):
    pair = write_pair(tmp_path, lambda name, *sizes: nv_floats(*sizes), settings_of("W4A16_NVFP4", group_size=group))
    refused(pair.quantized, (UnsupportedModelError, InputError), "group")


def test_a_truncated_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(directory, WeightError, "truncated")


def test_transformers_would_take_codes_for_weights(directory):
    for change in (
        lambda: None,
        lambda: write_beside(directory),
        lambda: edit_config(directory, quantization_config=None),
    ):
        change()
        assert len(qc.capture(directory).schemes) == 7
        with pytest.raises(UnsupportedModelError, match="plain weights"):
            HFArtifact(directory)
