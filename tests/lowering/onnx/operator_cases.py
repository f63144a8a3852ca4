"""One or more calls of every ATen operator that has a builder: what goes in, and how it is called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.1


def ints(*shape: int, low: int = -9, high: int = 9) -> Tensor:
    return torch.randint(low, high, shape)


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


Case = tuple[Any, Callable[[int, int], tuple[Tensor, ...]], Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]]
CASES: dict[str, Case] = {}


def case(name: str, target: Any, inputs: Callable[[int, int], tuple[Tensor, ...]], arguments: Any = None) -> None:
    """``arguments(*tensors, b, s)`` gives the call's arguments; by default the tensors alone."""

    def call(*given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        found = given[:-2] if arguments is None else arguments(*given)
        if isinstance(found[-1], dict):
            return tuple(found[:-1]), found[-1]
        return tuple(found), {}

    assert name not in CASES
    CASES[name] = (target, inputs, call)


for _name in (
    "neg",
    "abs",
    "exp",
    "cos",
    "sin",
    "tanh",
    "sigmoid",
    "relu",
    "erf",
    "floor",
    "ceil",
    "round",
    "sign",
    "silu",
    "square",
):
    case(_name, getattr(aten, _name).default, lambda b, s: (floats(b, s, 8) * 3,))
for _name in ("sqrt", "rsqrt", "reciprocal", "log"):
    case(_name, getattr(aten, _name).default, lambda b, s: (positive(b, s),))
case("log1p", aten.log1p.default, lambda b, s: (positive(b, s),))
case("expm1", aten.expm1.default, lambda b, s: (floats(b, s),))
case("logsumexp", aten.logsumexp.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [-1], True))
case("squeeze all", aten.squeeze.default, lambda b, s: (floats(2, 1, 3, 1),))
case("reshape as", aten.reshape_as.default, lambda b, s: (floats(b, s, 4), floats(s, b, 4)))
case("view as", aten.view_as.default, lambda b, s: (floats(b, s, 4), floats(s, b, 4)))
case("softplus", aten.softplus.default, lambda b, s: (floats(b, s),))
case("clamp tensors", aten.clamp.Tensor, lambda b, s: (floats(b, s), -positive(s), positive(s)))
case("gelu", aten.gelu.default, lambda b, s: (floats(b, s, 8),))
case("gelu tanh", aten.gelu.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, {"approximate": "tanh"}))

for _name in ("add", "sub", "mul", "div"):
    _packet = getattr(aten, _name)
    case(_name, _packet.Tensor, lambda b, s: (floats(b, s, 8), positive(8)))
    case(f"{_name} number", _packet.Scalar, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 1.5))
case("add int and float", aten.add.Tensor, lambda b, s: (ints(b, s), floats(s)))
case("add size", aten.add.Tensor, lambda b, s: (ints(b, s),), lambda x, b, s: (x, s))
case("div ints", aten.div.Tensor, lambda b, s: (ints(b, s), ints(s, low=1)))
case(
    "div floor",
    aten.div.Tensor_mode,
    lambda b, s: (floats(b, s), positive(s)),
    lambda x, y, b, s: (x, y, {"rounding_mode": "floor"}),
)
case(
    "div trunc",
    aten.div.Tensor_mode,
    lambda b, s: (floats(b, s) * 9, positive(s)),
    lambda x, y, b, s: (x, y, {"rounding_mode": "trunc"}),
)
case(
    "div ints floor",
    aten.div.Scalar_mode,
    lambda b, s: (ints(b, s),),
    lambda x, b, s: (x, 4, {"rounding_mode": "floor"}),
)
case(
    "div ints trunc",
    aten.div.Scalar_mode,
    lambda b, s: (ints(b, s),),
    lambda x, b, s: (x, 4, {"rounding_mode": "trunc"}),
)
case("floor_divide", aten.floor_divide.default, lambda b, s: (ints(b, s), ints(s, low=1)))
case("floor_divide floats", aten.floor_divide.default, lambda b, s: (floats(b, s) * 9, positive(s)))
case("remainder", aten.remainder.Scalar, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 4))
case("remainder floats", aten.remainder.Tensor, lambda b, s: (floats(b, s), positive(s)))
case("rsub", aten.rsub.Scalar, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 1.0))
case("rsub tensor", aten.rsub.Tensor, lambda b, s: (floats(b, s), floats(s)))
case("pow", aten.pow.Tensor_Scalar, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 3))
case("pow tensor", aten.pow.Tensor_Tensor, lambda b, s: (positive(b, s), floats(s)))
case("pow of number", aten.pow.Scalar, lambda b, s: (floats(b, s),), lambda x, b, s: (2.0, x))
case("maximum", aten.maximum.default, lambda b, s: (floats(b, s), floats(s)))
case("minimum", aten.minimum.default, lambda b, s: (floats(b, s), floats(s)))
case("max other", aten.max.other, lambda b, s: (floats(b, s), floats(s)))
case("min other", aten.min.other, lambda b, s: (floats(b, s), floats(s)))
case("clamp", aten.clamp.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, -0.5, 0.5))
case("clamp above", aten.clamp.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, None, 0.5))
case("clamp_min", aten.clamp_min.default, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 1))
case("clamp_max", aten.clamp_max.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 0.25))

for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _packet = getattr(aten, _name)
    case(_name, _packet.Tensor, lambda b, s: (ints(b, s), ints(s)))
    case(f"{_name} number", _packet.Scalar, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 1))
    case(f"{_name} fraction", _packet.Scalar, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 0.5))
case("lt bools", aten.lt.Tensor, lambda b, s: (bools(b, s), bools(s)))
for _name in ("logical_and", "logical_or", "logical_xor"):
    case(_name, getattr(aten, _name).default, lambda b, s: (bools(b, s), ints(s, low=0, high=2)))
case("logical_not", aten.logical_not.default, lambda b, s: (bools(b, s),))
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__"):
    case(_name, getattr(aten, _name).Tensor, lambda b, s: (bools(b, s), bools(s)))
    case(f"{_name} ints", getattr(aten, _name).Tensor, lambda b, s: (ints(b, s), ints(s)))
case("bitwise_and number", aten.bitwise_and.Scalar, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 5))
case("bitwise_or number", aten.bitwise_or.Scalar, lambda b, s: (ints(b, s),), lambda x, b, s: (x, 5))
case("bitwise_not", aten.bitwise_not.default, lambda b, s: (bools(b, s),))
case("bitwise_not ints", aten.bitwise_not.default, lambda b, s: (ints(b, s),))
case("where", aten.where.self, lambda b, s: (bools(b, s), floats(b, s), floats(s)))
case("where other", aten.where.ScalarOther, lambda b, s: (bools(b, s), floats(b, s)), lambda c, x, b, s: (c, x, 2.0))
case("where self", aten.where.ScalarSelf, lambda b, s: (bools(b, s), floats(b, s)), lambda c, x, b, s: (c, 2.0, x))
case("where numbers", aten.where.Scalar, lambda b, s: (bools(b, s),), lambda c, b, s: (c, 1.0, 0.0))
case(
    "masked_fill",
    aten.masked_fill.Scalar,
    lambda b, s: (floats(b, s), bools(s)),
    lambda x, m, b, s: (x, m, float("-inf")),
)
case("masked_fill tensor", aten.masked_fill.Tensor, lambda b, s: (floats(b, s), bools(s), floats()))

case("to.dtype", aten.to.dtype, lambda b, s: (ints(b, s),), lambda x, b, s: (x, torch.float32))
case("to.dtype bool", aten.to.dtype, lambda b, s: (ints(b, s, low=0, high=2),), lambda x, b, s: (x, torch.bool))
case("to.dtype int32", aten.to.dtype, lambda b, s: (floats(b, s) * 9,), lambda x, b, s: (x, torch.int32))
case("to.device", aten.to.device, lambda b, s: (ints(b, s),), lambda x, b, s: (x, torch.device("cpu"), torch.float32))
case("to.dtype_layout", aten.to.dtype_layout, lambda b, s: (ints(b, s),), lambda x, b, s: (x, {"dtype": torch.float32}))
case("to.other", aten.to.other, lambda b, s: (ints(b, s), floats(s)))
case("_to_copy", aten._to_copy.default, lambda b, s: (ints(b, s),), lambda x, b, s: (x, {"dtype": torch.float32}))
case("type_as", aten.type_as.default, lambda b, s: (ints(b, s), floats(s)))
for _name in ("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy"):
    case(_name, getattr(aten, _name).default, lambda b, s: (floats(b, s),))
case("dropout", aten.dropout.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 0.5, False))

case("mean", aten.mean.dim, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [-1], True))
case("mean of ints as floats", aten.mean.dim, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [0, 1]))
case("mean of all", aten.mean.default, lambda b, s: (floats(b, s),))
case("sum", aten.sum.dim_IntList, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [1]))
case("sum of bools", aten.sum.dim_IntList, lambda b, s: (bools(b, s),), lambda x, b, s: (x, [-1], True))
case("sum of all", aten.sum.default, lambda b, s: (ints(b, s),))
case("amax", aten.amax.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [-1], True))
case("amin", aten.amin.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [-1]))
case("max of all", aten.max.default, lambda b, s: (floats(b, s),))
case("min of all", aten.min.default, lambda b, s: (ints(b, s),))
case("max dim", aten.max.dim, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 1))
case("min dim", aten.min.dim, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 0, True))
case("argmax", aten.argmax.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, -1))
case("argmax of all", aten.argmax.default, lambda b, s: (floats(b, s),))
case("argmin", aten.argmin.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, -1, True))
case("any", aten.any.default, lambda b, s: (bools(b, s),))
case("any dim", aten.any.dim, lambda b, s: (ints(b, s, low=0, high=2),), lambda x, b, s: (x, 1, True))
case("all", aten.all.default, lambda b, s: (bools(b, s),))
case("all dim", aten.all.dim, lambda b, s: (bools(b, s),), lambda x, b, s: (x, 1))
case("cumsum", aten.cumsum.default, lambda b, s: (ints(b, s),), lambda x, b, s: (x, -1))
case("cumsum of bools", aten.cumsum.default, lambda b, s: (bools(b, s),), lambda x, b, s: (x, 1))
case("softmax", aten.softmax.int, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 1))
case("_softmax", aten._softmax.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, -1, False))
case("topk", aten.topk.default, lambda b, s: (floats(b, 9),), lambda x, b, s: (x, 3))

case("matmul", aten.matmul.default, lambda b, s: (floats(b, s, 8), floats(8, 6)))
case("bmm", aten.bmm.default, lambda b, s: (floats(b, s, 8), floats(b, 8, s)))
case("mm", aten.mm.default, lambda b, s: (floats(s, 8), floats(8, 6)))
case("addmm", aten.addmm.default, lambda b, s: (floats(6), floats(s, 8), floats(8, 6)))
case(
    "conv1d",
    aten.conv1d.default,
    lambda b, s: (floats(b, 4, 9), floats(6, 2, 3), floats(6)),
    lambda x, w, c, *_: (x, w, c, [2], [1], [2], 2),
)
case("conv2d", aten.conv2d.default, lambda b, s: (floats(b, 3, 9, 8), floats(5, 3, 2, 3)))
case("conv3d", aten.conv3d.default, lambda b, s: (floats(b, 2, 4, 5, 6), floats(3, 2, 2, 2, 2), floats(3)))
case(
    "conv2d_same",
    aten.conv2d.padding,
    lambda b, s: (floats(b, 3, 9, 8), floats(5, 3, 2, 4), floats(5)),
    lambda x, w, c, *_: (x, w, c, [1, 1], "same"),
)
case(
    "conv1d_valid",
    aten.conv1d.padding,
    lambda b, s: (floats(b, 3, 9), floats(5, 3, 2)),
    lambda x, w, *_: (x, w, None, [2], "valid"),
)
case(
    "conv3d_same",
    aten.conv3d.padding,
    lambda b, s: (floats(b, 2, 4, 5, 6), floats(3, 2, 2, 3, 2)),
    lambda x, w, *_: (x, w, None, [1, 1, 1], "same", [1, 1, 2]),
)
case(
    "convolution",
    aten.convolution.default,
    lambda b, s: (floats(b, 3, 9, 8), floats(5, 3, 2, 3)),
    lambda x, w, *_: (x, w, None, [2, 1], [1, 0], [1, 2], False, [0, 0], 1),
)
case(
    "transposed_convolution",
    aten.convolution.default,
    lambda b, s: (floats(b, 4, 5, 6), floats(4, 3, 2, 3), floats(6)),
    lambda x, w, c, *_: (x, w, c, [2, 3], [1, 0], [1, 1], True, [1, 2], 2),
)
case("linear", aten.linear.default, lambda b, s: (floats(b, s, 8), floats(6, 8), floats(6)))
case("embedding", aten.embedding.default, lambda b, s: (floats(11, 8), ints(b, s, low=0, high=11)))
case(
    "layer_norm",
    aten.layer_norm.default,
    lambda b, s: (floats(b, s, 8), floats(8), floats(8)),
    lambda x, w, v, b, s: (x, [8], w, v, 1e-3),
)
case("layer_norm plain", aten.layer_norm.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [8]))
case(
    "native_layer_norm",
    aten.native_layer_norm.default,
    lambda b, s: (floats(b, s, 8), floats(8), floats(8)),
    lambda x, w, v, b, s: (x, [8], w, v, 1e-3),
)
_sdpa = aten.scaled_dot_product_attention.default
case("sdpa", _sdpa, lambda b, s: (floats(b, 4, s, 8), floats(b, 4, s, 8), floats(b, 4, s, 6)))
case(
    "sdpa causal",
    _sdpa,
    lambda b, s: (floats(b, 4, s, 8), floats(b, 4, 9, 8), floats(b, 4, 9, 8)),
    lambda q, k, v, b, s: (q, k, v, None, 0.0, True),
)
case(
    "sdpa mask",
    _sdpa,
    lambda b, s: (floats(b, 4, s, 8), floats(b, 4, 9, 8), floats(b, 4, 9, 8), floats(b, 1, s, 9)),
    lambda q, k, v, m, b, s: (q, k, v, m, {"scale": 0.3}),
)

case("view", aten.view.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [b, s, -1, 4]))
case("view one open", aten.view.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [-1, 8]))
case("reshape moved sizes", aten.reshape.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [8, b, s]))
case("_unsafe_view", aten._unsafe_view.default, lambda b, s: (floats(b, s, 4, 2),), lambda x, b, s: (x, [b, s, 8]))
case("flatten", aten.flatten.using_ints, lambda b, s: (floats(b, s, 4, 2),), lambda x, b, s: (x, 2, 3))
case("flatten front", aten.flatten.using_ints, lambda b, s: (floats(b, s, 4, 2),), lambda x, b, s: (x, 0, 1))
case("flatten before size", aten.flatten.using_ints, lambda b, s: (floats(4, b, s),), lambda x, b, s: (x, 0, 1))
case("transpose", aten.transpose.int, lambda b, s: (floats(b, s, 4, 2),), lambda x, b, s: (x, 1, -2))
case("t", aten.t.default, lambda b, s: (floats(b, s),))
case("permute", aten.permute.default, lambda b, s: (floats(b, s, 4),), lambda x, b, s: (x, [2, 0, -2]))
case("unsqueeze", aten.unsqueeze.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, -1))
case("squeeze", aten.squeeze.dim, lambda b, s: (floats(b, 1, s),), lambda x, b, s: (x, 1))
case("squeeze nothing", aten.squeeze.dim, lambda b, s: (floats(b, 3, s),), lambda x, b, s: (x, 1))
case("squeeze dims", aten.squeeze.dims, lambda b, s: (floats(b, 1, s, 1),), lambda x, b, s: (x, [1, 3]))
case("expand", aten.expand.default, lambda b, s: (floats(1, s, 1),), lambda x, b, s: (x, [3, -1, 4]))
case("expand to size", aten.expand.default, lambda b, s: (floats(b, 1), floats(s)), lambda x, y, b, s: (x, [2, b, s]))
case("expand_as", aten.expand_as.default, lambda b, s: (floats(1, s), floats(b, s)))
case("slice", aten.slice.Tensor, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 2, 4, 2**63 - 1))
case("slice negative", aten.slice.Tensor, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, -1, -3))
case("slice size", aten.slice.Tensor, lambda b, s: (floats(64, 8), floats(b, s)), lambda x, y, b, s: (x, 0, 0, s))
case("slice step", aten.slice.Tensor, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 2, 1, 8, 2))
case("slice all", aten.slice.Tensor, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 2, 0, 2**63 - 1))
case("select", aten.select.int, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 1, -1))
case("cat", aten.cat.default, lambda b, s: (floats(b, s), floats(b, 3)), lambda x, y, b, s: ([x, y], -1))
case("concat", aten.concat.default, lambda b, s: (floats(b, s), floats(b, 3)), lambda x, y, b, s: ([x, y], -1))
case("cat promotes", aten.cat.default, lambda b, s: (floats(b, s), ints(b, 3)), lambda x, y, b, s: ([x, y], 1))
case("cat with nothing", aten.cat.default, lambda b, s: (floats(0), floats(b, 3)), lambda x, y, b, s: ([x, y], 1))
case("stack", aten.stack.default, lambda b, s: (floats(b, s), floats(b, s)), lambda x, y, b, s: ([x, y], -1))
case("split", aten.split.Tensor, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 3, -1))
case(
    "split_with_sizes", aten.split_with_sizes.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, [2, 6], -1)
)
case("chunk", aten.chunk.default, lambda b, s: (floats(b, s, 8),), lambda x, b, s: (x, 3, 2))
case("index one", aten.index.Tensor, lambda b, s: (floats(b, 9, s), ints(4, low=-9)), lambda x, i, b, s: (x, [None, i]))
case(
    "index two",
    aten.index.Tensor,
    lambda b, s: (bools(b, s), ints(b, 1, 1, low=0, high=min(b, 3)), ints(1, 1, s, low=0, high=min(s, 4))),
    lambda x, i, j, b, s: (x, [i, j]),
)
case(
    "index two behind",
    aten.index.Tensor,
    lambda b, s: (floats(b, 3, 4, s), ints(6, 1, low=0, high=3), ints(2, low=0, high=4)),
    lambda x, i, j, b, s: (x, [None, i, j]),
)
case(
    "index_select",
    aten.index_select.default,
    lambda b, s: (floats(b, 9, s), ints(4, low=0)),
    lambda x, i, b, s: (x, 1, i),
)
case("gather", aten.gather.default, lambda b, s: (floats(b, 9), ints(b, 3, low=0)), lambda x, i, b, s: (x, 1, i))
case(
    "scatter",
    aten.scatter.src,
    lambda b, s: (floats(b, 9), torch.randperm(9)[:3].expand(b, 3).contiguous(), floats(b, 3)),
    lambda x, i, y, b, s: (x, 1, i, y),
)
case(
    "scatter number",
    aten.scatter.value,
    lambda b, s: (floats(b, 9), ints(b, 3, low=0)),
    lambda x, i, b, s: (x, 1, i, 1.5),
)
case("triu", aten.triu.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 1))
case("tril", aten.tril.default, lambda b, s: (floats(b, s),))
case("tril bools", aten.tril.default, lambda b, s: (bools(b, s),), lambda x, b, s: (x, -1))
case("repeat", aten.repeat.default, lambda b, s: (floats(1, 4),), lambda x, b, s: (x, [2, 3, 1]))
case(
    "repeat interleave",
    aten.repeat_interleave.self_int,
    lambda b, s: (floats(b, s, 4),),
    lambda x, b, s: (x, 3, 1),
)
case(
    "repeat interleave the last axis",
    aten.repeat_interleave.self_int,
    lambda b, s: (floats(b, s, 4),),
    lambda x, b, s: (x, 2, -1),
)
case("arange", aten.arange.default, lambda b, s: (floats(b, s),), lambda x, b, s: (s,))
case("arange start", aten.arange.start, lambda b, s: (floats(b, s),), lambda x, b, s: (-2, s))
case(
    "arange step",
    aten.arange.start_step,
    lambda b, s: (floats(b, s),),
    lambda x, b, s: (0, 8, 2, {"dtype": torch.float32}),
)
case("full", aten.full.default, lambda b, s: (floats(b, s),), lambda x, b, s: ([s, b], 2.5))
case("full 0-D", aten.full.default, lambda b, s: (floats(b, s),), lambda x, b, s: ([], 3))
case("new_full", aten.new_full.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, [s, 2], 2.5))
case("ones", aten.ones.default, lambda b, s: (floats(b, s),), lambda x, b, s: ([b, s], {"dtype": torch.bool}))
case("zeros", aten.zeros.default, lambda b, s: (floats(b, s),), lambda x, b, s: ([b, 3],))
case("new_ones", aten.new_ones.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, [], {"dtype": torch.bool}))
case("new_zeros", aten.new_zeros.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, [s, b]))
case("full_like", aten.full_like.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, 7.0))
case("ones_like", aten.ones_like.default, lambda b, s: (floats(b, s),), lambda x, b, s: (x, {"dtype": torch.int64}))
case("zeros_like", aten.zeros_like.default, lambda b, s: (ints(b, s),))
case("scalar_tensor", aten.scalar_tensor.default, lambda b, s: (floats(b, s),), lambda x, b, s: (1.5,))
