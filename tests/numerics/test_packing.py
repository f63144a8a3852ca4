"""Codes as a dense stream of bits."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qcompiler import numerics


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.booleans(), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_pack_round_trip(bits, signed, width, rows, seed):
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + (1 << bits), (rows, 2, width), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = numerics.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2, math.ceil(width * bits / 8))
    assert packed.is_contiguous()
    for row, stored in zip(codes.reshape(-1, width).tolist(), packed.reshape(-1, packed.shape[-1]), strict=True):
        stream = sum((code % (1 << bits)) << (bits * i) for i, code in enumerate(row))
        assert bytes(stored.tolist()) == stream.to_bytes(len(stored), "little")
    assert torch.equal(numerics.unpack_bits(packed, bits, width, signed=signed), codes)


def test_pack_takes_any_strides():
    codes = torch.randint(-8, 8, (6, 10), dtype=torch.int8)
    assert torch.equal(numerics.pack_bits(codes.T, 4), numerics.pack_bits(codes.T.contiguous(), 4))


@pytest.mark.parametrize(("dtype", "signed"), [("INT4", True), ("UINT4", False), ("INT2", True), ("UINT2", False)])
def test_pack_agrees_with_onnx(dtype, signed):
    onnx = pytest.importorskip("onnx")
    bits = int(dtype[-1])
    low = -(1 << (bits - 1)) if signed else 0
    codes = torch.randint(low, low + (1 << bits), (16,), dtype=torch.int8 if signed else torch.uint8)
    packed = bytes(numerics.pack_bits(codes, bits).tolist())
    tensor = onnx.helper.make_tensor("codes", getattr(onnx.TensorProto, dtype), [16], packed, raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype("int32").tolist() == codes.tolist()
