"""``codebook_linear``: a linear layer whose weight is places in tables, one per output channel, and a sparse rest.

    y[m, n] = sum_k x[m, k] * (table[n, codes[n, k]] + sparse[n, k]) + bias[n]

as SqueezeLLM writes weights (arXiv 2306.07629), with codes of two, three or four bits.

How codes and tables are stored says `codebook_layout`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler.errors import InputError, TargetError
from qcompiler.ir import Codebook, Csr
from qcompiler.lowering.kernels.codebook_linear.layout import (
    BITS,
    COLUMNS_PER_BLOCK,
    ELEMENTS,
    ROWS_PER_BLOCK,
    pack_codes,
    pack_table,
    selectors,
    unpack_codes,
    unpack_table,
)
from qcompiler.lowering.kernels.launch import library
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.numerics import QuantSpec

__all__ = ["OLDEST_CAPABILITY", "CodebookLinear", "check", "choose", "codebook_linear_reference"]

OLDEST_CAPABILITY = 80  # compute capability with bfloat16 tensor cores and asynchronous copies
_PIECE_BYTES = 1 << 20  # of dequantized weights that the CPU holds at a time: within the second-level cache


def choose(
    spec: QuantSpec, out_features: int, in_features: int, nnz: int, device: Device, dtype: torch.dtype
) -> Choice:
    """The implementation for a weight ``[out_features, in_features]`` with ``nnz`` weights apart.

    Args:
        spec: the number format of the weight.
        out_features, in_features: any size.
        nnz: numbers in the sparse matrix.
        device: where it will run.
        dtype: of activations.

    Raises:
        InputError: if the format has no codebook.
    """
    if not spec.codebook:
        raise InputError("a codebook layer takes weights with a codebook", got=spec, expected="a scheme with -lut")
    if device.kind == "cpu":
        return Choice("cpu", "PyTorch has no operator for codebooks: weights are looked up in pieces of a few rows")
    if device.kind != "cuda":
        return Choice("reference", f"no kernel for devices of kind {device.kind}")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("reference", f"the kernel takes float16 and bfloat16 activations, not {dtype}")
    if device.capability < OLDEST_CAPABILITY:
        return Choice("reference", f"the kernel needs compute capability 8.0, {device.name} has less")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if out_features * in_features >= 1 << 31 or nnz >= 1 << 31:
        return Choice("reference", "the kernel counts weights in 32 bits")
    return Choice("triton")


class CodebookLinear(nn.Module):
    """A linear layer with a packed codebook weight.

    Attributes:
        choice: the implementation, and why not a better one.
        codes, table: as `pack_codes` and `pack_table` give them.
        bias: ``[out]`` in the dtype of activations, or None.
        values, columns, row_offsets: the sparse matrix (`qcompiler.ir.qtensor.Csr`), columns int16 where that suffices;
            None for none.
    """

    codes: Tensor
    table: Tensor
    bias: Tensor | None
    values: Tensor | None
    columns: Tensor | None
    row_offsets: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        table: Tensor,
        bias: Tensor | None,
        sparse: Csr | None,
        in_features: int,
        out_features: int,
        choice: Choice,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.choice = choice
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)
        self.register_buffer("bias", bias)
        for name in ("values", "columns", "row_offsets"):
            self.register_buffer(name, None if sparse is None else getattr(sparse, name))

    @classmethod
    def from_weight(
        cls, weight: Codebook, bias: Tensor | None, *, device: torch.device, dtype: torch.dtype
    ) -> "CodebookLinear":
        """Packs a weight for a device.

        Args:
            weight: of any device.
            bias: ``[out]`` or None.
            device: where the layer will run.
            dtype: of activations; the table is rounded to it.

        Raises:
            InputError: for a sparse matrix that is none.
            TargetError: if a table or bias does not fit into the dtype.
        """
        rows, columns = weight.codes.shape
        sparse = weight.sparse if weight.sparse is not None and weight.sparse.values.numel() else None
        nnz = 0 if sparse is None else sparse.values.numel()
        choice = choose(weight.spec, rows, columns, nnz, Device.of(device), dtype)
        packed = pack_codes(weight.codes, weight.spec.bits)
        table = pack_table(_rounded(weight.table, dtype, "table"))
        added = None if sparse is None else _moved(_checked(sparse, rows, columns), columns, device)
        offset = None if bias is None else _rounded(bias, dtype, "bias").to(device)
        return cls(packed.to(device), table.to(device), offset, added, columns, rows, choice)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        sparse = (self.values, self.columns, self.row_offsets)
        if self.choice.implementation == "reference":
            return codebook_linear_reference(x, self.codes, self.table, self.bias, *sparse, self.out_features)
        y: Tensor = torch.ops.qcompiler_kernels.codebook_linear(
            x.contiguous(), self.codes, self.table, self.bias, *sparse, self.out_features
        )
        return y

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"{self.in_features}, {self.out_features}, bits={self.codes.shape[2]}, {self.choice.implementation}"


def codebook_linear_reference(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
) -> Tensor:
    """The whole weight looked up, then multiplied, in float32; arguments and result as those of the operator."""
    places = unpack_codes(codes, out_features, x.shape[-1])
    entries = unpack_table(table, codes.shape[2], x.dtype, out_features)
    weight: Tensor = torch.ops.qcompiler.codebook_dequantize(places, entries.float())
    if values is not None and columns is not None and row_offsets is not None:
        weight = torch.ops.qcompiler.sparse_add(weight, values.float(), columns.int(), row_offsets)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def check(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
) -> None:
    """Refuses arguments that would be read beyond their end, or as something else.

    Raises:
        InputError: naming the argument.
    """
    blocks = (-(-out_features // ROWS_PER_BLOCK), -(-x.shape[-1] // COLUMNS_PER_BLOCK) if x.ndim else 0)
    bits = codes.shape[2] if codes.ndim == 5 else 0
    words = (1 << bits) // 4 * x.element_size()
    _require("x", x, x.dtype in (torch.float16, torch.bfloat16, torch.float32), "float16, bfloat16 or float32")
    _require("codes", codes, codes.dtype == torch.uint8 and bits in BITS, "uint8, as pack_codes gives it")
    expected = (*blocks, bits, ROWS_PER_BLOCK, ELEMENTS)
    _require("codes", codes, codes.shape == expected, f"{list(expected)} for x {list(x.shape)}, {out_features} rows")
    _require("codes", codes, codes.data_ptr() % 16 == 0, "at an address that is a multiple of 16")
    shape = (words, blocks[0] * ROWS_PER_BLOCK)
    _require("table", table, table.dtype == torch.int32 and table.shape == shape, f"int32 {list(shape)} for {x.dtype}")
    if bias is not None:
        _require("bias", bias, bias.dtype == x.dtype and bias.shape == (out_features,), f"{x.dtype} [{out_features}]")
    parts = {"values": values, "columns": columns, "row_offsets": row_offsets}
    given = {name: part for name, part in parts.items() if part is not None}
    if given and len(given) < len(parts):
        raise InputError("a sparse matrix has three parts", got=", ".join(given), expected=", ".join(parts))
    if values is not None and columns is not None and row_offsets is not None:
        _require("values", values, values.dtype in (torch.float16, torch.bfloat16, torch.float32), "floating point")
        _require("columns", columns, columns.dtype in (torch.int16, torch.int32), "int16 or int32")
        _require("columns", columns, columns.shape == values.shape, f"{list(values.shape)}, as many as values")
        is_right = row_offsets.dtype == torch.int32 and row_offsets.shape == (out_features + 1,)
        _require("row_offsets", row_offsets, is_right, f"int32 [{out_features + 1}]")
    for name, tensor in {"x": x, "codes": codes, "table": table, "bias": bias, **given}.items():
        if tensor is not None:
            _require(name, tensor, tensor.is_contiguous(), "contiguous")
            _require(name, tensor, tensor.device == x.device, f"on {x.device}")


def _require(name: str, tensor: Tensor, is_right: bool, expected: str) -> None:
    if not is_right:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        raise InputError("codebook_linear cannot take this tensor", where=name, got=got, expected=expected)


def _fake(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _cpu(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
) -> Tensor:
    """Looks up two weights at a time, in a table of all pairs, a few rows after another.

    The two codes of a byte stay neighbours; columns of ``x`` are put into that order instead.
    """
    check(x, codes, table, bias, values, columns, row_offsets, out_features)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # PyTorch multiplies float16 slowly on CPUs
    bits, width = codes.shape[2], x.shape[-1]
    padded = codes.shape[1] * COLUMNS_PER_BLOCK
    flat = F.pad(x.reshape(x.shape[:-1].numel(), width), (0, padded - width)).to(dtype)
    flat = flat.view(-1, padded // 64, 2, ELEMENTS).transpose(-1, -2).reshape(flat.shape)
    entries = unpack_table(table, bits, x.dtype, table.shape[1]).to(dtype)
    entries = F.pad(entries, (0, 16 - entries.shape[1]))  # a nibble may say up to 15
    y = flat.new_empty((flat.shape[0], out_features))
    step = max(1, _PIECE_BYTES // (ROWS_PER_BLOCK * padded * dtype.itemsize))
    for first in range(0, codes.shape[0], step):
        start, end = first * ROWS_PER_BLOCK, min((first + step) * ROWS_PER_BLOCK, out_features)
        weight = _looked_up(codes[first : first + step], entries[start : (first + step) * ROWS_PER_BLOCK])
        weight = weight[: end - start]
        if values is not None and columns is not None and row_offsets is not None:
            _add_sparse(weight, values, columns, row_offsets[start : end + 1])
        y[:, start:end] = F.linear(flat, weight)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _looked_up(codes: Tensor, entries: Tensor) -> Tensor:
    """Weights of whole blocks of rows, columns in the order of the bytes: ``[rows, columns]`` of ``entries``' dtype."""
    rows = entries.shape[0]
    pairs = torch.stack((entries[:, None].expand(rows, 16, 16), entries[..., None].expand(rows, 16, 16)), -1)
    wide = torch.int32 if entries.element_size() == 2 else torch.int64
    groups = selectors(codes).permute(0, 3, 1, 2, 4).reshape(rows, -1)
    places = groups + torch.arange(0, rows * 256, 256, dtype=torch.int32)[:, None]
    return pairs.view(wide).reshape(-1).index_select(0, places.reshape(-1)).view(entries.dtype).view(rows, -1)


def _add_sparse(weight: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor) -> None:
    """Adds a few rows of the sparse matrix, in place, to weights in the order of `_looked_up`."""
    start, end = int(row_offsets[0]), int(row_offsets[-1])
    rows = torch.arange(weight.shape[0]).repeat_interleave(row_offsets.diff(), output_size=end - start)
    column = columns[start:end].long()
    tile, element = column // ELEMENTS, column % ELEMENTS
    place = (tile // 2 * ELEMENTS + element) * 2 + tile % 2
    weight.view(-1).index_add_(0, rows * weight.shape[1] + place, values[start:end].to(weight.dtype))


def _cuda(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    columns: Tensor | None,
    row_offsets: Tensor | None,
    out_features: int,
) -> Tensor:
    from qcompiler.lowering.kernels.codebook_linear import triton_launch as codebook_linear_triton

    with torch.cuda.device(x.device):
        return codebook_linear_triton.launch(x, codes, table, bias, values, columns, row_offsets, out_features)


library.define(
    "codebook_linear(Tensor x, Tensor codes, Tensor table, Tensor? bias, Tensor? values, Tensor? columns, "
    "Tensor? row_offsets, int out_features) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if not bool(rounded.isfinite().all()):
        raise TargetError(
            "values beyond the range of the activations' dtype", where=name, got=f"up to {tensor.abs().max()}",
            expected=f"at most {torch.finfo(dtype).max:g}", remedy="choose bfloat16",
        )  # fmt: skip
    return rounded


def _checked(sparse: Csr, rows: int, columns: int) -> Csr:
    nnz = sparse.values.numel()
    steps = sparse.row_offsets.diff()
    is_right = sparse.row_offsets.shape == (rows + 1,) and sparse.columns.shape == (nnz,)
    is_right = is_right and int(sparse.row_offsets[0]) == 0 and int(sparse.row_offsets[-1]) == nnz
    if not is_right or bool((steps < 0).any()):
        raise InputError("row offsets that fit neither rows nor values", where="the sparse matrix", got=f"{nnz} values")
    if int(sparse.columns.min()) < 0 or int(sparse.columns.max()) >= columns:
        raise InputError("a column that the matrix does not have", where="the sparse matrix", expected=f"0..{columns}")
    row = torch.arange(rows, device=steps.device).repeat_interleave(steps, output_size=nnz)
    if bool(((row * columns + sparse.columns).diff() <= 0).any()):
        raise InputError(
            "columns of a row that do not ascend", where="the sparse matrix", expected="each once, ascending"
        )
    return sparse


def _moved(sparse: Csr, columns: int, device: torch.device) -> Csr:
    narrow = torch.int16 if columns <= 1 << 15 else torch.int32
    return Csr(sparse.values.to(device), sparse.columns.to(device, narrow), sparse.row_offsets.to(device))
