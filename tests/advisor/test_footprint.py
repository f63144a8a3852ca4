"""Bytes: the published figures, and what is really stored."""

import pytest
import torch

from qcompiler import numerics
from qcompiler.advisor import cache_bytes, cache_bytes_per_token, told_shape, weight_bytes, weight_parts
from qcompiler.advisor.footprint import activation_bytes, fitted
from qcompiler.ir import Affine, CacheFormat
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.passes.recipes import CACHES
from tests.advisor.models import LLAMA_2_70B

BILLIONS_70 = (7_000_000, 10_000)  # a matrix of 70 billion weights
INT4, INT8 = QuantSpec("int4", "per_tensor", None), QuantSpec("int8", "per_tensor", None)


def test_70_billion_parameters_at_16_8_and_4_bits() -> None:
    assert 2 * weight_bytes(*BILLIONS_70, None) == 280e9  # of 32 bits
    assert weight_bytes(*BILLIONS_70, None) == 140e9
    assert weight_bytes(*BILLIONS_70, INT8) == pytest.approx(70e9, abs=2)
    assert weight_bytes(*BILLIONS_70, INT4) == pytest.approx(35e9, abs=2)


@pytest.mark.parametrize(
    ("spec", "width", "overhead"),
    [
        (QuantSpec("int4", "per_group", 128), 8192, 0.03125),
        (QuantSpec("int4", "per_group", 32), 8192, 0.125),
        (QuantSpec("int4", "per_channel", None), 1024, 0.0039),
        (QuantSpec("int8", "per_channel", None), 512, 0.0039),
        (QuantSpec("int4", "per_group", 128, symmetric=False), 8192, 0.0390625),
        (QuantSpec("float4_e2m1", "per_group", 16, scale_dtype="float8_e4m3fn"), 8192, 0.125),
        (QuantSpec("float4_e2m1", "per_group", 32, scale_dtype="float8_e8m0fnu"), 8192, 0.0625),
        (QuantSpec("float8_e4m3fn", "per_block", 128), 8192, 4 / 128**2),
        (QuantSpec("int4", "per_channel", None, codebook=True), 8192, 16 * 2 / 4096),
    ],
)
def test_overhead_of_scales(spec: QuantSpec, width: int, overhead: float) -> None:
    rows = 4096
    assert weight_bytes(rows, width, spec) / (rows * width * spec.bits / 8) - 1 == pytest.approx(overhead, abs=1e-5)


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w4a16-g32", "w8a16", "w3a16", "w8a16-tensor"])
def test_it_is_what_is_stored(name: str) -> None:
    spec = Scheme.parse(name).weight
    assert spec is not None
    weight = torch.randn(48, 256)
    affine = Affine.of(weight, *numerics.min_max_qparams(weight, spec, torch.bfloat16), spec, torch.bfloat16)
    parts = affine.codes.numel() * spec.bits / 8 + affine.scale.numel() * 2
    parts += 0 if affine.zero_point is None else affine.zero_point.numel() * spec.bits / 8
    assert weight_bytes(48, 256, spec) == parts


def test_codebooks_keep_weights_apart() -> None:
    spec = QuantSpec("int4", "per_channel", None, codebook=True)
    more = weight_bytes(100, 1000, spec, kept_apart=0.01) - weight_bytes(100, 1000, spec)
    assert more == 1000 * 6


def test_groups_give_way_to_widths() -> None:
    spec = QuantSpec("int4", "per_group", 128)
    assert fitted(spec, 4096) is spec
    assert fitted(spec, 576).group_size == 64
    assert fitted(spec, 48).group_size == 16 or fitted(spec, 48).group_of(48) == 48
    assert fitted(spec, 129).group_size == 128  # nothing divides


def test_tables_and_head_stay_in_float() -> None:
    shape = told_shape(**LLAMA_2_70B)
    parts = weight_parts(shape, Scheme.parse("w4a16"))
    assert parts["table"] == parts["head"] == 32000 * 8192 * 2
    layers = shape.parameters - shape.others - 2 * 32000 * 8192
    assert parts["attention"] + parts["mlp"] == layers * (4 + 16 / 128) / 8
    quantized = weight_parts(shape, Scheme.parse("w4a16"), QuantSpec("int8", "per_channel", None))
    assert quantized["table"] == 32000 * 8192 + 32000 * 2
    assert sum(weight_parts(shape, Scheme()).values()) == 2 * shape.parameters


def test_the_cache_of_llama_2_70b() -> None:
    shape = told_shape(**LLAMA_2_70B)
    assert cache_bytes_per_token(shape, None, None) == 327_680
    assert cache_bytes(shape, None, None, 128 * 1024) == 40 * 2**30  # "about 40 GB"


def test_caches_count_their_scales() -> None:
    shape = told_shape(**LLAMA_2_70B)
    elements = 80 * 8 * 128 * 2
    found = {name: make().cache_formats()[0] for name, make in CACHES.items()}
    tokens = {name: cache_bytes_per_token(shape, spec, spec) for name, spec in found.items()}
    assert tokens["kv-fp8-static"] == elements
    assert tokens["kv-fp8"] == tokens["kv-int8"] == elements * (1 + 2 / 128)
    assert tokens["kv-int4"] == elements * (0.5 + 3 / 16)
    assert cache_bytes_per_token(shape, CacheFormat("int8"), None) == (tokens["kv-int8"] + 327_680) / 2


def test_windows_are_full_at_some_time() -> None:
    from dataclasses import replace

    shape = replace(told_shape(**LLAMA_2_70B), cached_layers=20, windowed_layers=60, window=1024)
    each = 327_680 / 80
    assert cache_bytes(shape, None, None, 512) == 512 * 327_680
    assert cache_bytes(shape, None, None, 8192) == each * (20 * 8192 + 60 * 1024)


def test_activations_stop_growing_with_the_prompt() -> None:
    shape = told_shape(**LLAMA_2_70B)
    assert activation_bytes(shape, 4096, 8) == activation_bytes(shape, 65536, 8)
    assert activation_bytes(shape, 16, 1) < activation_bytes(shape, 2048, 1)
