"""The kernels around the product, interpreted or on a GPU: values, sums and sparse matrices by hand."""

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.codebook_linear import triton_kernels as kernels
from qcompiler.lowering.kernels.codebook_linear.layout import pack_codes, pack_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("permutes", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_dequantize_is_exact(bits: int, dtype: torch.dtype, permutes: bool) -> None:
    out, width = 37, 300
    codes = torch.randint(0, 1 << bits, (out, width), dtype=torch.uint8)
    table = torch.randn(out, 1 << bits).to(dtype)
    packed, words = pack_codes(codes, bits).to(DEVICE), pack_table(table).to(DEVICE)
    weight = torch.full((out, width), torch.nan, dtype=dtype, device=DEVICE)
    kernels.dequantize[(2, 2)](
        weight, packed, words, out, width, words.shape[1], packed.shape[1], BITS=bits, OUT=32, PTX=permutes
    )
    assert torch.equal(weight.cpu(), table.gather(1, codes.long()))


@pytest.mark.parametrize("columns_dtype", [torch.int16, torch.int32])
def test_sparse_rows_of_all_lengths(columns_dtype: torch.dtype) -> None:
    """Rows with none, one, just a step, and many numbers, in both kernels that read them."""
    rows, out, width = 3, 20, 400
    lengths = torch.tensor([0, 1, 16, 17, 0, 400, *range(14)])
    columns = torch.cat([torch.randperm(width)[:length].sort().values for length in lengths])
    values = torch.randn(len(columns)).half()
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    matrix = torch.zeros(out, width, dtype=torch.float64)
    matrix[torch.arange(out).repeat_interleave(lengths), columns] = values.double()
    parts = [part.to(DEVICE) for part in (values, columns.to(columns_dtype), offsets)]

    weight = torch.randn(out, width, dtype=torch.float16, device=DEVICE)
    wanted = (weight.cpu().double() + matrix).half()
    kernels.add_sparse[(2,)](weight, *parts, out, width, OUT=16, STEP=16)
    assert torch.equal(weight.cpu(), wanted)

    x, bias = torch.randn(rows, width).half().to(DEVICE), torch.randn(out).half().to(DEVICE)
    partial = torch.randn(2, rows, out, device=DEVICE)
    exact = partial.sum(0).double().cpu() + x.cpu().double() @ matrix.T + bias.cpu().double()
    for a, block in ((x, 4), (x.t().contiguous().t(), 2)):
        y = torch.full((rows, out), torch.nan, dtype=torch.float16, device=DEVICE)
        kernels.finish[(2, -(-rows // block))](
            *(y, partial, a, bias, *parts, rows, out, *a.stride()),
            **{"SPLIT": 2, "ROWS": block, "OUT": 16, "STEP": 8, "SPARSE": True, "HAS_BIAS": True},
        )
        assert (y.cpu().double() - exact).abs().max() < 1e-3 * exact.abs().max()
