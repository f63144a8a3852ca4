"""Products of matrices. Source: onnx/docs/Operators.md, onnxruntime/docs/ContribOperators.md."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompiler.frontend.onnx.call import Call, Operators
from qcompiler.frontend.onnx.values import Value

__all__ = ["CONTRIB_PRODUCTS", "PRODUCTS"]


def _matmul(call: Call) -> Value:
    return torch.matmul(call.tensor(0), call.tensor(1))


def _gemm(call: Call) -> Value:
    """``alpha * op(A) @ op(B) + beta * C``."""
    a, b, c = call.tensor(0), call.tensor(1), call.optional_tensor(2)
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    a = a.t() if call.get("transA", 0) else a
    if call.get("transB", 0) and alpha == beta == 1.0 and (c is None or c.dim() == 1):
        return F.linear(a, b, c)
    b = b.t() if call.get("transB", 0) else b
    if alpha == beta == 1.0 and c is not None and c.dim() == 1 and c.shape[0] == b.shape[1]:
        return torch.addmm(c, a, b)
    product = torch.mm(a, b)
    product = product if alpha == 1.0 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * beta)


def _einsum(call: Call) -> Value:
    return torch.einsum(call.get("equation"), *(call.tensor(index) for index in range(len(call.inputs))))


def _fused_matmul(call: Call) -> Value:
    call.refuse(transBatchA=0, transBatchB=0)
    a, b = call.tensor(0), call.tensor(1)
    a = a.transpose(-1, -2) if call.get("transA", 0) else a
    b = _transposed(b) if call.get("transB", 0) else b
    product = torch.matmul(a, b)
    return product if call.get("alpha", 1.0) == 1.0 else product * call.get("alpha")


def _transposed(b: Tensor) -> Tensor:
    return b.t() if b.dim() == 2 else b.transpose(-1, -2)


PRODUCTS: Operators = {"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum}
CONTRIB_PRODUCTS: Operators = {"FusedMatMul": _fused_matmul}
