"""A part of building: which operators run in the dtype of a lowered model, and which stay in float32.

A node is *narrow* if its value has the model's dtype, *wide* if it has float32. Products of matrices are narrow, and so
is what only moves their values or costs one rounding of its own, which computes in float32 anyway. Whatever else a
graph holds (softmax, powers, positions, norms that were not recognised, routers) is computed in float32, as the graph
was captured.
"""

import operator
from typing import Any, Literal

import torch

__all__ = ["Precision", "is_moving", "precision_of"]

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler

Precision = Literal["narrow", "follow", "mixed", "wide"]

_NARROW = (_canonical.linear.default, _canonical.attention.default, _aten.embedding.default)
_MIXED = (_canonical.rms_norm.default, _canonical.rotary.default)
_MOVING = (
    operator.getitem,
    _aten.cat.default,
    _aten.stack.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.expand.default,
    _aten.slice.Tensor,
    _aten.select.int,
    _aten.narrow.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
    _aten.unbind.int,
    _aten.index_select.default,
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.neg.default,
    _aten.relu.default,
    _canonical.kv_append.default,
    _canonical.take_expert.default,
    _canonical.merge_experts.default,
)
_ROUNDING = (
    _aten.add.Tensor,
    _aten.add.Scalar,
    _aten.sub.Tensor,
    _aten.mul.Tensor,
    _aten.mul.Scalar,
    _aten.silu.default,
    _aten.gelu.default,
    _aten.tanh.default,
    _aten.sigmoid.default,
)


def precision_of(target: Any) -> Precision:
    """What an operator is given, and gives.

    ``narrow``: takes and gives the model's dtype. ``follow``: the same if anything it takes is narrow, float32
    otherwise. ``mixed``: as ``follow``, but what it takes beside its first argument (weights of norms, cosines) stays
    wide; it computes in float32 itself. ``wide``: takes and gives float32.
    """
    if target in _NARROW:
        return "narrow"
    if target in _MIXED:
        return "mixed"
    return "follow" if target in _MOVING or target in _ROUNDING else "wide"


def is_moving(target: Any) -> bool:
    """Whether an operator moves values and rounds none."""
    return target in _MOVING
