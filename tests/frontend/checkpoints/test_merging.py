"""Experts: stored one by one in most checkpoints, all in one tensor in models of transformers."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcompiler as qc
from qcompiler.artifacts import HFArtifact, NativeArtifact
from qcompiler.errors import WeightError
from qcompiler.frontend.checkpoints.contents import Checkpoint, Layer
from qcompiler.frontend.checkpoints.merging import merge_layers
from qcompiler.ir import Site
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import verify_graph
from qcompiler.storage import WeightStore
from tests.frontend.checkpoints.comparing import IDS, refused
from tests.frontend.checkpoints.packers import (
    awq_weight,
    ct_settings,
    edit_config,
    edit_settings,
    edit_tensors,
    expand,
    fp4_weight,
    gptq_weight,
    packed_weight,
    plain_weight,
    rewrite_pair,
)
from tests.models import VOCABULARY, build

EXPERTS = "model.layers.0.mlp.experts"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKENS = IDS % VOCABULARY


def ct(**weights):
    layout = "float-quantized" if weights.get("type") == "float" else "pack-quantized"
    return ct_settings("nvfp4-pack-quantized" if weights["num_bits"] == 4 and "type" in weights else layout, weights)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Hidden 32, experts of 32 channels."""
    directory = tmp_path_factory.mktemp("source") / "model"
    build("qwen3_moe", layers=1, hidden_size=32, moe_intermediate_size=32).save_pretrained(directory)
    return directory


def pair_of(source, place, make, settings):
    shutil.copytree(source, place / "quantized")
    return rewrite_pair(place, lambda name, *sizes: make(name, *sizes), settings)


def checked(pair):
    """The captured graph, which computes what transformers computes of the numbers."""
    graph = qc.capture(pair.quantized)
    verify_graph(graph)
    expected = HFArtifact(pair.floats).forward(TOKENS)
    torch.testing.assert_close(NativeArtifact(graph).forward(TOKENS), expected, rtol=1e-5, atol=1e-5)
    return graph


def expert_sites(graph):
    return [site for site in graph.sites() if site.name.startswith(EXPERTS)]


@pytest.mark.parametrize(
    ("settings", "make", "spec"),
    [
        (GPTQ, lambda name, *sizes: gptq_weight(*sizes, group=16), "int4 g16 symmetric"),
        ({**GPTQ, "sym": False}, lambda _, *s: gptq_weight(*s, group=16, symmetric=False), "int4 g16 asymmetric"),
        (AWQ, lambda name, *sizes: awq_weight(*sizes, group=16), "int4 g16 asymmetric"),
        (ct(num_bits=4, group_size=16), lambda name, *sizes: packed_weight(*sizes, group=16), "int4 g16 symmetric"),
        (ct(**FLOAT8), lambda name, *sizes: plain_weight(*sizes, kind="float8"), "float8_e4m3fn per_channel"),
        (
            ct(**{**FLOAT8, "strategy": "tensor"}),
            lambda name, *sizes: plain_weight(*sizes, kind="float8", strategy="tensor"),
            "float8_e4m3fn per_channel",
        ),
        (
            ct(**{**FLOAT8, "strategy": "block", "block_structure": [32, 32]}),
            lambda name, *sizes: plain_weight(*sizes, kind="float8", strategy="block"),
            "float8_e4m3fn 32x32 blocks",
        ),
        (
            ct(num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
            lambda name, *sizes: fp4_weight(*sizes, nv=True),
            "float4_e2m1 g16 E4M3 scales",
        ),
    ],
)
def test_experts_keep_their_codes(mixture, tmp_path, settings, make, spec):
    graph = checked(pair_of(mixture, tmp_path, make, settings))
    sites = expert_sites(graph)
    assert len(sites) > 4
    assert {str(graph.schemes[site.name].weight) for site in sites if "gate_up" in site.name} == {spec}
    assert not [note for note in graph.notes if "float weights" in note]


def test_experts_are_written_to_another_target(mixture, tmp_path):
    pair = pair_of(mixture, tmp_path, lambda name, *sizes: gptq_weight(*sizes, group=16), GPTQ)
    report = qc.lower(pair.quantized, "onnx", tmp_path / "onnx")
    assert report["parity"]["max_difference"] <= 1e-4


def test_act_order_that_gate_and_up_share(mixture, tmp_path):
    order = np.random.default_rng(5).permutation(32) // 16

    def make(name, rows, columns, generator):
        return gptq_weight(rows, columns, generator, group=16, g_idx=order)

    graph = checked(pair_of(mixture, tmp_path, make, {**GPTQ, "desc_act": True}))
    assert all(site.name in graph.schemes for site in expert_sites(graph))


def test_act_orders_that_differ_stay_float(mixture, tmp_path):
    def make(name, rows, columns, generator):
        return gptq_weight(rows, columns, generator, group=16, g_idx=generator.permutation(columns) // 16)

    graph = checked(pair_of(mixture, tmp_path, make, {**GPTQ, "desc_act": True}))
    names = {site.name.rpartition(".")[0] for site in expert_sites(graph) if site.name in graph.schemes}
    assert names == {f"{EXPERTS}.down_proj"}
    (note,) = graph.notes
    assert "float weights: model.layers.0.mlp.experts.0.gate_proj" in note


def test_factors_that_differ_stay_float(mixture, tmp_path):
    def make(name, rows, columns, generator):
        found = fp4_weight(rows, columns, generator, nv=True)
        if not name.endswith("up_proj"):
            return found
        found.tensors["weight_global_scale"] = found.tensors["weight_global_scale"] / 2
        return type(found)(found.tensors, found.values * 2)

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    graph = checked(pair_of(mixture, tmp_path, make, ct(**weights, scale_dtype="torch.float8_e4m3fn")))
    assert {site.name for site in expert_sites(graph) if site.name not in graph.schemes} == {
        site.name for site in expert_sites(graph) if "gate_up" in site.name
    }


def test_inputs_that_differ_stay_float_with_the_weights(mixture, tmp_path):
    def make(name, rows, columns, generator):
        found = plain_weight(rows, columns, generator, kind="float8", strategy="tensor")
        found.tensors["input_scale"] = torch.full((1,), 0.02 if name.endswith("up_proj") else 0.01)
        return found

    settings = ct(**{**FLOAT8, "strategy": "tensor"})
    settings["config_groups"]["group_0"]["input_activations"] = {**FLOAT8, "strategy": "tensor"}
    graph = qc.capture(pair_of(mixture, tmp_path, make, settings).quantized)
    assert graph.schemes[f"{EXPERTS}.down_proj.0"].activation is not None
    assert f"{EXPERTS}.gate_up_proj.0" not in graph.schemes
    (lost,) = graph.lost
    assert lost.startswith("inputs stay in float of layers that are taken as float weights: model.layers.0.mlp.experts")


def test_experts_of_two_formats_stay_float(mixture, tmp_path):
    def make(name, rows, columns, generator):
        bits = 8 if name.endswith("gate_proj") else 4
        return gptq_weight(rows, columns, generator, group=16, bits=bits)

    settings = {**GPTQ, "dynamic": {r"+:.*gate_proj": {"bits": 8}}}
    graph = checked(pair_of(mixture, tmp_path, make, settings))
    assert f"{EXPERTS}.gate_up_proj.0" not in graph.schemes
    assert f"{EXPERTS}.down_proj.0" in graph.schemes


@pytest.mark.parametrize(
    ("function", "is_merged"),
    [
        (lambda a, b: torch.cat([a, b]), True),
        (lambda a, b: torch.cat([b, a]), False),
        (lambda a, b: torch.cat([a, b], 1).reshape(-1, a.shape[1]), False),
        (lambda a, b: torch.cat([a.T.T, b.flip(1)]), False),
        (lambda a, b: a.view(4, 6, 1, 1).squeeze(), False),
    ],
)
def test_only_rows_below_each_other_are_merged(function, is_merged):
    checkpoint = Checkpoint(WeightStore.from_tensors({}), "test")
    for name in "ab":
        checkpoint.parts.set(f"{name}.weight_codes", torch.zeros(4, 6, dtype=torch.int8))
        checkpoint.parts.set(f"{name}.weight_scale", torch.ones(4))
        checkpoint.add(Layer(name, 4, 6, Scheme(QuantSpec("int8", "per_channel", None))))
    graph = SimpleNamespace(weights=WeightStore())
    options = {"dtype": "float32", "shape": (8, 6), "rearranges": True, "store": checkpoint.floats}
    graph.weights.derive("x.weight", ("a.weight", "b.weight"), function, **options)
    layer, sources = merge_layers(graph, Site("x", "x.weight", (), 8, 6), checkpoint)
    assert (layer is not None) == is_merged == bool(sources) == ("x.weight_codes" in graph.weights)


# --- experts in 4-bit floats, as GPT-OSS has them ---------------------------------------------------------------------


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny GPT-OSS, and the float model of the same numbers."""
    place = tmp_path_factory.mktemp("gpt_oss")
    model = build("gpt_oss", layers=1, hidden_size=64, intermediate_size=32)
    model.to(torch.bfloat16).save_pretrained(place / "floats")
    shutil.copytree(place / "floats", place / "quantized")
    tensors = load_file(place / "floats" / "model.safetensors")
    generator, packed = np.random.default_rng(1), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors[name].shape
        codes = generator.integers(0, 16, (experts, rows, columns))
        exponents = generator.integers(119, 123, (experts, rows, columns // 32))
        numbers = np.array([*GRID, *(-value for value in GRID)])[codes]
        sizes = 2.0 ** (expand(exponents.reshape(-1, columns // 32), 32, columns) - 127)
        values = numbers * sizes.reshape(numbers.shape)
        bytes_ = np.zeros((experts, rows, columns // 32, 16), np.uint8)
        for column in range(columns):
            bytes_[:, :, column // 32, column % 32 // 2] |= (codes[:, :, column] << (4 * (column % 2))).astype(np.uint8)
        tensors[name] = torch.from_numpy(values).transpose(1, 2).contiguous().float()
        del packed[name]
        packed |= {
            f"{name}_blocks": torch.from_numpy(bytes_),
            f"{name}_scales": torch.from_numpy(exponents).to(torch.uint8),
        }
    for directory, found in (("floats", tensors), ("quantized", packed)):
        save_file(found, place / directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(place / "quantized", quantization_config=MXFP4)
    return place


def test_experts_of_gpt_oss_keep_their_codes(gpt_oss):
    graph = qc.capture(gpt_oss / "quantized")
    verify_graph(graph)
    sites = expert_sites(graph)
    assert {str(graph.schemes[site.name].weight) for site in sites} == {"float4_e2m1 g32 E8M0 scales (floor)"}
    assert len(sites) == len(graph.schemes)
    assert not graph.notes
    expected = HFArtifact(gpt_oss / "floats").forward(TOKENS)
    torch.testing.assert_close(NativeArtifact(graph).forward(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_transformers_makes_of_it(gpt_oss):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        gpt_oss / "quantized", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    torch.nn.Module.float(model)
    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
    found = NativeArtifact(qc.capture(gpt_oss / "quantized")).forward(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_one_expert_is_read_at_a_time(gpt_oss):
    graph = qc.capture(gpt_oss / "quantized")
    name = f"{EXPERTS}.gate_up_proj.1.weight_codes"
    assert graph.weights.info(name).shape == (64, 64)
    assert graph.weights.read(name).shape == (64, 64)


@pytest.mark.parametrize("damage", ["gone", "shape", "dtype", "blocks", "kept"])
def test_tensors_that_contradict_each_other(gpt_oss, tmp_path, damage):
    directory = shutil.copytree(gpt_oss / "quantized", tmp_path / "model")
    blocks, scales = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"

    def change(tensors):
        if damage == "gone":
            tensors.pop(scales)
        elif damage == "shape":
            tensors[scales] = tensors[scales][:, :1].contiguous()
        elif damage == "dtype":
            tensors[scales] = tensors[scales].float()
        elif damage == "blocks":
            tensors.pop(blocks)

    edit_tensors(directory, change)
    if damage == "kept":
        edit_settings(directory, modules_to_not_convert=[f"{EXPERTS}.down_proj"])
    where = refused(directory, WeightError, "lacks|shape|dtype|leave it in float").where
    assert where == (blocks if damage in ("blocks", "kept") else scales)
