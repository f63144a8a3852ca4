"""Bounds of time, on numbers that can be worked out by hand; and what several GPUs hold."""

import pytest

from qcompiler.advisor import find_hardware, known_hardware, told_shape, weight_parts
from qcompiler.advisor.parallel import divided, undivided
from qcompiler.advisor.roofline import (
    decode_step,
    operand_type,
    prefill_seconds,
    read_seconds,
    stops_paying,
    touched,
)
from qcompiler.numerics import Scheme
from tests.advisor.models import LLAMA_2_13B, LLAMA_2_70B, LLAMA_3_8B, MIXTRAL

KNOWN = known_hardware()
A100, H100 = find_hardware("a100", KNOWN), find_hardware("h100", KNOWN)


def test_an_a100_reads_70_billion_parameters() -> None:
    assert [read_seconds(size, 2e12) for size in (140e9, 70e9, 35e9)] == [0.07, 0.035, 0.0175]


@pytest.mark.parametrize(
    ("scheme", "operands"),
    [
        ("w4a16", "float16"),
        ("w8a16", "float16"),
        ("w8a8", "int8"),
        ("w4a8-dynamic", "int8"),
        ("w4a4", "int4"),
        ("fp8", "float8"),
        ("nvfp4", "float4"),
        ("nvfp4a16", "float16"),
    ],
)
def test_what_layers_are_multiplied_in(scheme: str, operands: str) -> None:
    assert operand_type(Scheme.parse(scheme), H100) == operands


def test_a_step_reads_weights_and_caches_but_one_row_of_the_table() -> None:
    shape = told_shape(**LLAMA_3_8B)
    step = decode_step(
        shape, A100, "float16", weights=16e9, experts=0, table=1e9, cache=5e9, context=1024, batch=1, gpus=1
    )
    assert step.reading == pytest.approx(20e9 / 2.039e12)
    assert step.computing == pytest.approx((2 * shape.multiplied + 4 * 1024 * 4096 * 32) / 312e12)
    assert step.seconds == step.reading
    assert not step.is_compute_bound


def test_many_sequences_are_compute_bound() -> None:
    shape = told_shape(**LLAMA_3_8B)
    step = decode_step(shape, A100, "float16", weights=16e9, experts=0, table=0, cache=0, context=1, batch=512, gpus=1)
    assert step.is_compute_bound
    halved = decode_step(shape, A100, "int8", weights=16e9, experts=0, table=0, cache=0, context=1, batch=512, gpus=1)
    head = 128256 * 4096
    assert step.computing is not None
    assert halved.computing is not None
    assert step.computing - halved.computing == pytest.approx(
        512 * (shape.multiplied - head) * (2 / 312e12 - 2 / 624e12)
    )


def test_an_unknown_rate_leaves_reading() -> None:
    shape = told_shape(**LLAMA_3_8B)
    step = decode_step(shape, A100, "float8", weights=16e9, experts=0, table=0, cache=0, context=1, batch=1)
    assert step.computing is None
    assert step.seconds == step.reading
    assert prefill_seconds(shape, A100, "float8", tokens=10, batch=1) is None


def test_prompts_attend_to_half_of_themselves() -> None:
    shape = told_shape(**LLAMA_3_8B)
    found = prefill_seconds(shape, A100, "float16", tokens=1000, batch=2)
    pairs = 2 * 1000 * 1001 / 2
    assert found == pytest.approx((2 * 2000 * shape.multiplied + 4 * pairs * 4096 * 32) / 312e12)


def test_few_tokens_touch_few_experts() -> None:
    shape = told_shape(**MIXTRAL)
    assert touched(shape, 1) == 0.25
    assert touched(shape, 2) == pytest.approx(1 - 0.75**2)
    assert touched(shape, 1000) == pytest.approx(1)
    assert touched(told_shape(**LLAMA_3_8B), 1) == 1


def test_where_four_bits_stop_paying() -> None:
    """Reading ``b`` bytes of eight bits takes as long as multiplying them in 16 bits for ``rate / (2 bandwidth)``."""
    wide = read_seconds(70e9, H100.bandwidth)
    rate = H100.rates["float16"]
    batch = stops_paying(lambda size: max(wide / 2, 2 * size * 70e9 / rate), lambda size: max(wide, size * 70e9 / rate))
    assert batch == pytest.approx(rate / (2 * H100.bandwidth), abs=1)
    assert batch == 148
    assert stops_paying(lambda size: 1.0, lambda size: 2.0) is None
    assert stops_paying(lambda size: 2.0, lambda size: 1.0) == 1


def test_what_several_gpus_hold() -> None:
    shape = told_shape(**LLAMA_2_70B)
    parts = weight_parts(shape, Scheme())
    one, four = (divided(shape, parts, 40e9, 1e9, count) for count in (1, 4))
    norms = 2 * shape.others
    assert one.weights == 2 * shape.parameters
    assert four.weights == pytest.approx(norms + (one.weights - norms) / 4)
    assert (four.cache, four.activations) == (10e9, 1e9)
    assert divided(shape, parts, 40e9, 1e9, 16).cache == 5e9  # one head of eight each: held twice


def test_what_does_not_divide() -> None:
    scheme = Scheme.parse("w4a16")
    assert undivided(told_shape(**LLAMA_2_70B), scheme, 4) == ()
    assert undivided(told_shape(**LLAMA_2_70B), scheme, 16) == ("8 heads of keys and values are held 2 times",)
    found = " ".join(undivided(told_shape(**LLAMA_2_13B), scheme, 16))
    assert "40 heads do not divide by 16" in found
    assert "864 channels of the MLP on each do not divide into groups of 128" in found
    assert "40 heads of keys and values and 16 GPUs do not divide each other" in found
    assert "13824 channels does not divide by 5" in " ".join(undivided(told_shape(**LLAMA_2_13B), scheme, 5))
    assert "32000 words do not divide by 3" in " ".join(undivided(told_shape(**LLAMA_2_13B), scheme, 3))
