"""The data file: layout, packing, memory, and numbers that do not fit."""

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompiler.errors import TargetError, VerificationError
from qcompiler.lowering.onnx.storage import DataFile, code_chunks, float_chunks, stored_bytes


def written(data: DataFile) -> bytes:
    content = bytearray()
    data.write(content.extend)
    return bytes(content)


def bytes_of(chunks) -> bytes:
    return b"".join(bytes(chunk.view(torch.uint8).numpy().data) for chunk in chunks())


@pytest.mark.parametrize("shape", [(3, 5), (64, 33), (700, 7001)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_packed_over_the_whole_tensor(shape, transpose, bits):
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT2
    raw = bytes_of(code_chunks(lambda: codes, dtype, transpose=transpose))
    wanted = codes.T if transpose else codes
    assert len(raw) == stored_bytes(dtype, tuple(wanted.shape)) == math.ceil(codes.numel() * bits / 8)
    array = wanted.numpy().astype(ml_dtypes.int4 if bits == 4 else ml_dtypes.int2)
    assert raw == ir.tensor(array).tobytes()


@pytest.mark.parametrize("transpose", [False, True])
def test_float_strips_make_up_the_tensor(transpose):
    tensor = torch.randn(3000, 1700).bfloat16()
    chunks = list(float_chunks(lambda: tensor, torch.float32, "w", transpose=transpose)())
    assert len(chunks) > 1
    assert max(chunk.numel() for chunk in chunks) <= 1 << 22
    expected = (tensor.T if transpose else tensor).float()
    assert torch.equal(torch.cat([chunk.reshape(-1) for chunk in chunks]), expected.reshape(-1))


@pytest.mark.parametrize("shape", [(1, 32), (32, 1)])
def test_a_matrix_of_one_row_or_column(shape):
    tensor = torch.randn(shape)
    assert bytes_of(float_chunks(lambda: tensor, torch.float32, "w", transpose=True)) == tensor.numpy().tobytes()


def test_tensors_are_aligned_and_found_at_their_offset():
    data = DataFile()
    values = [np.arange(n, dtype=np.int8) for n in (5, 70, 1)]
    tensors = [
        data.add(f"t{i}", ir.DataType.INT8, v.shape, lambda v=v: iter([torch.from_numpy(v)]))
        for i, v in enumerate(values)
    ]
    assert [tensor.offset for tensor in tensors] == [0, 64, 192]
    content = written(data)
    assert len(content) == data.nbytes == 193
    for tensor, value in zip(tensors, values, strict=True):
        assert content[tensor.offset : tensor.offset + tensor.length] == value.tobytes()


def test_a_weight_of_the_wrong_size_is_noticed():
    data = DataFile()
    data.add("w", ir.DataType.FLOAT, (3,), lambda: iter([torch.zeros(2)]))
    with pytest.raises(VerificationError) as caught:
        written(data)
    assert (caught.value.where, caught.value.got, caught.value.expected) == ("w", "8 bytes", "12 bytes")


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [("w", 7e4, False), ("w", 6.5e4, True), ("w", 1e-9, True), ("w_scale", 1e-9, False), ("w_scale", 1e-5, True)],
)
def test_what_float16_cannot_hold(name, value, fits):
    chunks = float_chunks(lambda: torch.tensor([1.0, value]), torch.float16, name)
    if fits:
        assert bytes_of(chunks) == torch.tensor([1.0, value]).half().numpy().tobytes()
    else:
        with pytest.raises(TargetError, match="float16") as caught:
            bytes_of(chunks)
        assert caught.value.where == name
