"""Checkpoints of compressed-tensors, written in loops from the format's description."""

import numpy as np
import pytest
import torch

from tests.frontend.checkpoints.comparing import assert_rounded_model, assert_same_model, round_in_groups
from tests.frontend.checkpoints.packers import (
    ct_settings,
    edit_tensors,
    expand,
    fp4_weight,
    mxfp8_weight,
    packed_weight,
    plain_weight,
    write_pair,
)

UP = "model.layers.0.mlp.up_proj"


def packed_pair(place, *, bits=4, group=32, symmetric=True):
    def make(name, rows, columns, generator):
        return packed_weight(rows, columns, generator, bits=bits, group=group, symmetric=symmetric)

    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return write_pair(place, make, ct_settings("pack-quantized", weights))


def plain_pair(place, *, kind, strategy, inputs=None, layout=None, change=None):
    def make(name, rows, columns, generator):
        return plain_weight(rows, columns, generator, kind=kind, strategy=strategy)

    weights = {"num_bits": 8, "type": kind[:-1], "symmetric": True, "strategy": strategy, "dynamic": False}
    if strategy == "block":
        weights["block_structure"] = [32, 32]
    found = layout or ("int-quantized" if kind == "int8" else "float-quantized")
    pair = write_pair(place, make, ct_settings(found, weights, inputs))
    if change is not None:
        edit_tensors(pair.quantized, change)
    return pair


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_integers(tmp_path, bits, symmetric):
    graph = assert_same_model(packed_pair(tmp_path, bits=bits, symmetric=symmetric))
    held = bits if bits in (2, 3, 4) else 8
    weight = graph.schemes[UP].weight
    assert (weight.dtype, weight.group_size, weight.symmetric) == (f"int{held}", 32, symmetric)
    assert len(graph.notes) == (bits in (5, 6, 7))
    assert all(note.startswith(f"codes of {bits} bits are held in 8: ") for note in graph.notes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_with_a_scale_per_channel(tmp_path, symmetric):
    graph = assert_same_model(packed_pair(tmp_path, group=-1, symmetric=symmetric))
    assert graph.schemes[UP].weight.granularity == "per_channel"


def test_groups_that_are_no_neighbours(tmp_path):
    places = {columns: np.random.default_rng(columns).permutation(columns) // 32 for columns in (64, 96)}

    def make(name, rows, columns, generator):
        weight = packed_weight(rows, columns, generator)
        codes = weight.values / expand(weight.tensors["weight_scale"].float().numpy(), 32, columns)
        scales = weight.tensors["weight_scale"].float().numpy()[:, places[columns]]
        weight.tensors["weight_g_idx"] = torch.from_numpy(places[columns].astype(np.int32))
        return type(weight)(weight.tensors, (codes * scales).astype(np.float32))

    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"}
    graph = assert_same_model(write_pair(tmp_path, make, ct_settings("pack-quantized", weights)))
    assert sum(node.target is torch.ops.aten.index_select.default for node in graph.fx.nodes) == 4


@pytest.mark.parametrize(
    ("kind", "strategy", "layout"),
    [
        ("int8", "channel", "int-quantized"),
        ("int8", "tensor", "naive-quantized"),
        ("float8", "channel", "float-quantized"),
        ("float8", "tensor", "naive-quantized"),
        ("float8", "block", "float-quantized"),
    ],
)
def test_codes_of_eight_bits(tmp_path, kind, strategy, layout):
    graph = assert_same_model(plain_pair(tmp_path, kind=kind, strategy=strategy, layout=layout))
    weight = graph.schemes[UP].weight
    assert weight.granularity == f"per_{strategy}"
    assert weight.dtype == ("int8" if kind == "int8" else "float8_e4m3fn")


def test_codes_of_eight_bits_with_a_zero_point(tmp_path):
    def make(name, rows, columns, generator):
        weight = plain_weight(rows, columns, generator)
        zeros = generator.integers(-20, 20, (rows, 1)).astype(np.int8)
        weight.tensors["weight_zero_point"] = torch.from_numpy(zeros)
        shift = zeros * weight.tensors["weight_scale"].numpy()
        return type(weight)(weight.tensors, weight.values - shift)

    weights = {"num_bits": 8, "strategy": "channel", "symmetric": False}
    graph = assert_same_model(write_pair(tmp_path, make, ct_settings("int-quantized", weights)))
    assert not graph.schemes[UP].weight.symmetric


@pytest.mark.parametrize("nv", [True, False])
def test_four_bit_floats(tmp_path, nv):
    def make(name, rows, columns, generator):
        return fp4_weight(rows, columns, generator, nv=nv)

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group" if nv else "group"}
    weights |= {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"} if nv else {"group_size": 32}
    layout = "nvfp4-pack-quantized" if nv else "mxfp4-pack-quantized"
    graph = assert_same_model(write_pair(tmp_path, make, ct_settings(layout, weights)))
    assert graph.schemes[UP].weight.has_factor is nv


@pytest.mark.parametrize("with_inputs", [True, False])
def test_eight_bit_floats_with_powers_of_two(tmp_path, with_inputs):
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    inputs = {**weights, "dynamic": True} if with_inputs else None
    settings = ct_settings("mxfp8-quantized", weights, inputs)
    graph = assert_same_model(write_pair(tmp_path, lambda name, *sizes: mxfp8_weight(*sizes), settings))
    assert str(graph.schemes[UP].weight) == "float8_e4m3fn g32"
    assert len(graph.lost) == with_inputs


def test_layers_of_several_formats(tmp_path):
    def make(name, rows, columns, generator):
        if name.endswith("down_proj"):
            return plain_weight(rows, columns, generator, kind="float8", strategy="channel")
        return None if name.endswith("o_proj") else packed_weight(rows, columns, generator)

    settings = ct_settings("mixed-precision", {"num_bits": 4, "group_size": 32})
    group = settings["config_groups"]["group_0"]
    other = {"num_bits": 8, "type": "float", "strategy": "channel"}
    settings["config_groups"] = {
        "group_0": {**group, "format": "pack-quantized", "targets": ["Linear"]},
        "group_1": {**group, "format": "float-quantized", "targets": ["re:.*down_proj$"], "weights": other},
    }
    settings["ignore"] = ["lm_head", "re:.*o_proj"]
    graph = assert_same_model(write_pair(tmp_path, make, settings), sites=6)
    assert graph.schemes["model.layers.0.mlp.down_proj"].weight.dtype == "float8_e4m3fn"
    assert graph.schemes[UP].weight.dtype == "int4"


# --- inputs -----------------------------------------------------------------------------------------------------------


def per_token(x, largest, dtype=None):
    scale = x.abs().amax(-1, keepdim=True) / largest
    codes = torch.round(x / scale).clamp(-128, 127) if dtype is None else (x / scale).clamp(-448, 448).to(dtype).float()
    return codes * scale


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_inputs_rounded_per_token(tmp_path, kind):
    inputs = {"num_bits": 8, "type": kind[:-1], "strategy": "token", "dynamic": True}
    pair = plain_pair(tmp_path, kind=kind, strategy="channel", inputs=inputs)
    largest, dtype = (127.5, None) if kind == "int8" else (448, torch.float8_e4m3fn)
    graph = assert_rounded_model(pair, lambda name, x: per_token(x, largest, dtype))
    assert graph.schemes[UP].activation.granularity == "per_token"
    rounded = [node for node in graph.fx.nodes if node.target is torch.ops.qcompiler.quantize.default]
    assert len(rounded) == 4  # once for all layers that read a value


def scale_of(name):
    return 0.02 + 0.01 * (len(name) % 3)


def zero_of(name):
    return len(name) % 7 - 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_rounded_with_a_static_scale(tmp_path, symmetric):
    def change(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            module = name.removesuffix(".weight_scale")
            tensors[f"{module}.input_scale"] = torch.tensor([scale_of(module)])
            if not symmetric:
                tensors[f"{module}.input_zero_point"] = torch.tensor([zero_of(module)], dtype=torch.int8)

    def round_input(name, x):
        zero = 0 if symmetric else zero_of(name)
        codes = (torch.round(x / scale_of(name)) + zero).clamp(-128, 127)
        return (codes - zero) * scale_of(name)

    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": symmetric, "dynamic": False}
    pair = plain_pair(tmp_path, kind="int8", strategy="tensor", inputs=inputs, change=change)
    graph = assert_rounded_model(pair, round_input)
    rounded = [node for node in graph.fx.nodes if node.target is torch.ops.qcompiler.quantize.default]
    sites = [site for site in graph.sites() if site.name in graph.schemes]
    wanted = {(site.inputs[0].args[0].args[0], scale_of(site.name), zero_of(site.name)) for site in sites}
    assert len(rounded) == (len(wanted) if not symmetric else len({key[:2] for key in wanted}))


def test_inputs_of_nvfp4(tmp_path):
    def make(name, rows, columns, generator):
        weight = fp4_weight(rows, columns, generator, nv=True)
        weight.tensors["input_global_scale"] = torch.tensor([448 * 6 / 4.0])
        return weight

    one = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    pair = write_pair(tmp_path, make, ct_settings("nvfp4-pack-quantized", one, {**one, "dynamic": "local"}))

    def round_input(name, x):
        divisor, blocks = 448 * 6 / 4.0, x.unflatten(-1, (-1, 16))
        local = (blocks.abs().amax(-1, keepdim=True) / 6 * divisor).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        scale = local / divisor
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = grid[((blocks / scale).abs()[..., None] - grid).abs().argmin(-1)]
        return (nearest * blocks.sign() * scale).flatten(-2)

    graph = assert_rounded_model(pair, round_input)
    assert graph.schemes[UP].activation.has_factor


def test_inputs_rounded_in_groups(tmp_path):
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}
    pair = plain_pair(tmp_path, kind="float8", strategy="block", inputs=inputs)
    graph = assert_rounded_model(pair, round_in_groups(32))
    assert str(graph.schemes[UP].activation) == "float8_e4m3fn g32 dynamic"
    assert graph.lost == []


def test_inputs_rounded_in_groups_with_a_zero_point_stay_in_float(tmp_path):
    inputs = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32, "dynamic": True}
    pair = plain_pair(tmp_path, kind="float8", strategy="block", inputs=inputs)
    graph = assert_same_model(pair)
    (lost,) = graph.lost
    assert lost.startswith("inputs stay in float, since no operator rounds them as int8 group dynamic: ")
    assert lost.endswith(" and 3 more")
