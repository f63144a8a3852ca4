"""Values of a module that is being built: dtypes, casts and stored tensors, each made once."""

import pytest
import torch
from torch import nn

from qcompiler.lowering.kernels.module.plan import Plan
from qcompiler.lowering.kernels.module.values import WIDE, ModuleValues, dtype_name
from tests.tiny_graphs import language_model

_aten, _canonical = torch.ops.aten, torch.ops.qcompiler
HALF = torch.bfloat16


@pytest.fixture
def graph():
    return language_model()


@pytest.fixture
def values(graph):
    return ModuleValues(graph, Plan(graph), torch.device("cpu"), HALF)


def first(graph, target):
    return next(node for node in graph.fx.nodes if node.target is target)


def test_a_value_is_cast_once_and_noted_as_rounded(graph, values):
    norm = first(graph, _canonical.rms_norm.default)
    assert norm not in values
    values[norm] = wide = values.made(values.fx.placeholder("x"), WIDE)
    assert norm in values
    assert values[norm] is values.in_dtype(norm, WIDE) is wide
    assert not values.rounded
    narrow = values.narrow(norm)
    assert (narrow.target, narrow.args) == (_aten.to.dtype, (wide, HALF))
    assert values.narrow(norm) is narrow
    assert values.rounded == {norm}
    assert (values.dtype_of(wide), values.dtype_of(narrow), values.dtype_behind(norm)) == (WIDE, HALF, WIDE)


def test_what_is_no_floating_point_is_never_cast(graph, values):
    norm = first(graph, _canonical.rms_norm.default)
    values[norm] = codes = values.call(_aten.ones.default, ([2],), None)
    assert values.narrow(norm) is codes
    values[norm] = 3  # a size
    assert values.narrow(norm) == 3
    assert not values.rounded


def test_stored_tensors_are_buffers_of_each_dtype_that_is_asked_for(graph, values):
    weight = first(graph, _canonical.rms_norm.default).args[1]
    assert weight in values
    wide, narrow = values[weight], values.narrow(weight)
    assert values.stored(weight, WIDE) is wide
    assert values.narrow(weight) is narrow
    assert {values.members[node.target].dtype for node in (wide, narrow)} == {WIDE, HALF}
    assert torch.equal(values.members[wide.target], graph.weights.read(str(weight.target)))
    assert values.dtype_behind(weight) is None
    assert not values.rounded


def test_members_of_the_same_name_are_kept_apart(values):
    one, other = nn.Identity(), nn.Identity()
    names = [values.member("layer", module) for module in (one, other, one)]
    assert len({*names}) == 2
    assert [values.members[name] for name in names] == [one, other, one]


def test_names_of_dtypes():
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
