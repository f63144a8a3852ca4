"""How operators are put into the namespace."""

import pytest
import torch

from qcompiler.lowering.kernels.launch import library


def _doubled(x):
    return 2 * x


library.define(
    "test_doubled(Tensor x) -> Tensor",
    fake=torch.empty_like,
    cpu=_doubled,
    cuda=lambda x: _doubled(x),
)


def test_an_operator_has_an_implementation_for_each_device_and_shapes_for_tracing():
    x = torch.arange(3.0)
    operator = torch.ops.qcompiler_kernels.test_doubled
    assert operator(x).tolist() == [0, 2, 4]
    assert torch.library.opcheck(operator.default, (x,), test_utils=("test_schema", "test_faketensor"))
    found = torch.compile(operator, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(found, operator(x))


def test_other_devices_have_none():
    with pytest.raises(NotImplementedError):
        torch.ops.qcompiler_kernels.test_doubled(torch.empty(3, device="meta").to_sparse())
