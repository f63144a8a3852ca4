"""The codebook layer: its layout, the CPU implementation against the reference, choices and refusals."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qcompiler.errors import InputError, TargetError
from qcompiler.ir.qtensor import Codebook, Csr
from qcompiler.lowering.kernels.codebook_linear import operator as module
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear, choose
from qcompiler.lowering.kernels.launch.device import Device
from qcompiler.numerics.spec import QuantSpec

CPU = torch.device("cpu")
H200 = Device("cuda", "a GPU", 90, True)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}  # of the largest result


def spec(bits: int) -> QuantSpec:
    return QuantSpec(f"int{bits}", "per_channel", None, codebook=True)


def sparse_matrix(rows: int, columns: int, share: float, dtype: torch.dtype) -> Csr:
    """Every third row empty, the second as good as full."""
    apart = torch.rand(rows, columns) < share
    apart[::3] = False
    if rows > 1:
        apart[1] = torch.rand(columns) < 0.9
    offsets = torch.zeros(rows + 1, dtype=torch.int32)
    offsets[1:] = apart.sum(-1).cumsum(0)
    values = torch.randn(int(apart.sum())).to(dtype)
    return Csr(values, apart.nonzero()[:, 1].to(torch.int32), offsets)


def weight(rows: int, columns: int, bits: int, *, share: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> Codebook:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    table = torch.randn(rows, 1 << bits).sort(-1).values.to(dtype)
    return Codebook(codes, table, sparse_matrix(rows, columns, share, dtype) if share else None, spec(bits))


def relative(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(48, 512, (1,)), (37, 300, (2, 3)), (530, 1100, (19,)), (3, 5, ())]
)
def test_the_cpu_computes_what_the_graph_says(
    dtype: torch.dtype, bits: int, rows: int, columns: int, batch: tuple[int, ...]
) -> None:
    given = weight(rows, columns, bits, dtype=dtype)
    bias = torch.randn(rows).to(dtype)
    layer = CodebookLinear.from_weight(given, bias, device=CPU, dtype=dtype)
    x = torch.randn(*batch, columns).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), given.dequantize().double(), bias.double())
    got = layer(x)
    assert got.dtype == dtype
    assert relative(got, wanted) < TOLERANCE[dtype]
    parts = (layer.values, layer.columns, layer.row_offsets)
    reference = module.codebook_linear_reference(x, layer.codes, layer.table, layer.bias, *parts, rows)
    assert relative(reference, wanted) < TOLERANCE[dtype]


def test_without_a_sparse_matrix_and_with_an_empty_one() -> None:
    given = weight(20, 270, 3, share=0, dtype=torch.float32)
    empty = Csr(torch.empty(0), torch.empty(0, dtype=torch.int32), torch.zeros(21, dtype=torch.int32))
    x = torch.randn(4, 270)
    for variant in (given, replace(given, sparse=empty)):
        layer = CodebookLinear.from_weight(variant, None, device=CPU, dtype=torch.float32)
        assert layer.values is None
        assert relative(layer(x), x @ given.dequantize().T) < TOLERANCE[torch.float32]


def test_no_rows_of_input_give_none() -> None:
    layer = CodebookLinear.from_weight(weight(20, 270, 4), None, device=CPU, dtype=torch.bfloat16)
    assert layer(torch.empty(2, 0, 270, dtype=torch.bfloat16)).shape == (2, 0, 20)


def test_inputs_of_any_strides_go_into_the_layer() -> None:
    layer = CodebookLinear.from_weight(weight(20, 270, 4, dtype=torch.float32), None, device=CPU, dtype=torch.float32)
    x = torch.randn(270, 6).T
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_columns_are_stored_in_two_bytes_where_they_fit() -> None:
    narrow = CodebookLinear.from_weight(weight(3, 32768, 4), None, device=CPU, dtype=torch.bfloat16)
    wide_weight = weight(3, 32769, 4)
    wide = CodebookLinear.from_weight(wide_weight, None, device=CPU, dtype=torch.float32)
    assert narrow.columns is not None
    assert narrow.columns.dtype == torch.int16
    assert wide.columns is not None
    assert wide.columns.dtype == torch.int32
    x = torch.randn(1, 32769)
    assert relative(wide(x), x @ wide_weight.dequantize().T) < 1e-5


def test_it_traces_and_passes_the_checks_of_an_operator() -> None:
    layer = CodebookLinear.from_weight(weight(20, 270, 4), None, device=CPU, dtype=torch.bfloat16)
    arguments = (layer.codes, layer.table, None, layer.values, layer.columns, layer.row_offsets, 20)
    operator = torch.ops.qcompiler_kernels.codebook_linear.default
    torch.library.opcheck(
        operator,
        (torch.randn(2, 270).bfloat16(), *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_choices() -> None:
    for kind, dtype, expected in (
        (Device("cpu"), torch.bfloat16, "cpu"),
        (H200, torch.float16, "triton"),
        (H200, torch.bfloat16, "triton"),
        (H200, torch.float32, "reference"),
        (replace(H200, capability=75), torch.float16, "reference"),
        (replace(H200, has_triton=False), torch.float16, "reference"),
        (Device("mps"), torch.float16, "reference"),
    ):
        choice = choose(spec(4), 64, 64, 0, kind, dtype)
        assert choice.implementation == expected
        assert bool(choice.reason) == (expected != "triton")
    assert choose(spec(3), 1 << 16, 1 << 15, 0, H200, torch.float16).implementation == "reference"
    with pytest.raises(InputError, match="codebook"):
        choose(QuantSpec("int4"), 64, 64, 0, H200, torch.float16)


def test_what_does_not_fit_is_refused() -> None:
    given = weight(20, 270, 4)
    layer = CodebookLinear.from_weight(given, torch.ones(20), device=CPU, dtype=torch.bfloat16)
    x = torch.randn(2, 270).bfloat16()
    good = {
        "x": x,
        "codes": layer.codes,
        "table": layer.table,
        "bias": layer.bias,
        "values": layer.values,
        "columns": layer.columns,
        "row_offsets": layer.row_offsets,
        "out_features": 20,
    }
    assert layer.columns is not None
    assert layer.row_offsets is not None
    shifted = torch.empty(layer.codes.numel() + 1, dtype=torch.uint8)[1:].view(layer.codes.shape)
    for name, bad in {
        "x": x.double(),
        "codes": layer.codes.int(),
        "table": layer.table[:, :-1],
        "bias": torch.ones(20),
        "values": None,
        "columns": layer.columns.long(),
        "row_offsets": layer.row_offsets[:-1],
        "out_features": 40,
    }.items():
        with pytest.raises(InputError):
            torch.ops.qcompiler_kernels.codebook_linear(**{**good, name: bad})
    for name, bad in {"x": torch.randn(270, 2).bfloat16().T, "codes": shifted}.items():
        with pytest.raises(InputError) as caught:
            torch.ops.qcompiler_kernels.codebook_linear(**{**good, name: bad})
        assert caught.value.where == name
    with pytest.raises(InputError):  # 270 columns are one block more than 256
        torch.ops.qcompiler_kernels.codebook_linear(**{**good, "x": x[:, :256].contiguous()})


def test_weights_that_are_none_are_refused() -> None:
    given = weight(20, 270, 4)
    assert given.sparse is not None
    twice = given.sparse.columns.clone()
    twice[1] = twice[0]
    for bad in (
        replace(given.sparse, columns=given.sparse.columns + 200),
        replace(given.sparse, columns=twice),
        replace(given.sparse, row_offsets=given.sparse.row_offsets[:-1]),
    ):
        with pytest.raises(InputError):
            CodebookLinear.from_weight(replace(given, sparse=bad), None, device=CPU, dtype=torch.bfloat16)
    with pytest.raises(TargetError, match="beyond the range"):
        CodebookLinear.from_weight(
            replace(given, table=given.table.float() * 1e5), None, device=CPU, dtype=torch.float16
        )
