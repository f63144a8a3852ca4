"""Codes and tables by the error of the output, against loops and direct solutions."""

import pytest
import torch
from torch import Tensor

from qcompiler.passes.solvers import codebook_descent as _codebook_descent
from qcompiler.passes.solvers.codebook_descent import damped, improve, shifted
from qcompiler.passes.solvers.kmeans import cluster, nearest


def layer(rows: int = 9, width: int = 40, levels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weight, inputs that are strongly correlated, damped Gram matrix, codes and table."""
    weight = torch.randn(rows, width)
    x = torch.randn(400, 6) @ torch.randn(6, width) + 0.3 * torch.randn(400, width)
    hessian = damped(x.T @ x, 0.01)
    table = cluster(weight, hessian.diagonal()[None], levels).float()
    return weight, x, hessian, nearest(weight, table), table


def loss(weight: Tensor, codes: Tensor, table: Tensor, hessian: Tensor, apart: Tensor | None = None) -> Tensor:
    """``E H E'`` of every row, double precision."""
    error = (weight - table.float().gather(1, codes.long())).double()
    if apart is not None:
        error[apart] = 0
    return ((error @ hessian.double()) * error).sum(-1)


@pytest.mark.parametrize("is_apart", [False, True])
def test_codes_are_those_of_a_plain_loop(is_apart):
    weight, _, hessian, codes, table = layer()
    apart = torch.rand(weight.shape) < 0.1 if is_apart else None
    found, same = improve(weight, codes, table, hessian, apart, 1)
    assert torch.equal(same, table)
    for r in range(len(weight)):
        value = table[r, codes[r].long()].double()
        error = weight[r].double() - value
        if apart is not None:
            error[apart[r]] = 0
        for i in range(weight.shape[1]):
            if apart is not None and apart[r, i]:
                continue
            wanted = value[i] + (hessian[i].double() @ error) / hessian[i, i].double()
            code = int((table[r].double() - wanted).abs().argmin())
            error[i] += value[i] - table[r, code].double()
            value[i] = table[r, code].double()
            assert code == int(found[r, i])


@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_turn_raises_the_error_of_a_row(is_apart, dtype):
    weight, _, hessian, _, table = layer(rows=30)
    table = table.to(dtype)
    codes = nearest(weight, table.float())
    apart = torch.rand(weight.shape) < 0.1 if is_apart else None
    before = loss(weight, codes, table, hessian, apart)
    at_start = before
    for rounds in range(1, 6):
        found, better = improve(weight, codes, table, hessian, apart, rounds)
        after = loss(weight, found, better, hessian, apart)
        assert bool((after <= before * (1 + 1e-5)).all())
        assert better.dtype == dtype
        assert bool((better.float().diff(dim=-1) >= 0).all())
        before = after
    assert float(after.sum()) < 0.5 * float(at_start.sum())


def test_tables_are_the_best_for_their_codes():
    weight, _, hessian, codes, table = layer()
    codes, moved = _codebook_descent._refitted(weight, codes, table, hessian, None)
    for r in range(len(weight)):
        chosen = torch.nn.functional.one_hot(codes[r].long(), 4).double()
        curvature = chosen.T @ hessian.double() @ chosen
        best = torch.linalg.solve(curvature, chosen.T @ hessian.double() @ weight[r].double())
        torch.testing.assert_close(moved[r].double(), best, rtol=1e-3, atol=1e-3)


def test_a_value_that_no_code_uses_stays():
    weight, _, hessian, codes, table = layer()
    table[:, 3] = 50.0
    codes = nearest(weight, table)
    assert not bool((codes == 3).any())
    _, moved = improve(weight, codes, table, hessian, None, 3)
    assert moved[:, 3].tolist() == [50.0] * len(weight)
    assert bool(moved.isfinite().all())


def test_what_is_given_is_left_alone_and_no_rounds_change_nothing():
    weight, _, hessian, codes, table = layer()
    kept = codes.clone(), table.clone()
    improve(weight, codes, table, hessian, None, 3)
    assert torch.equal(codes, kept[0])
    assert torch.equal(table, kept[1])
    found = improve(weight, codes, table, hessian, None, 0)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], table)


def test_rows_in_parts_are_the_same(monkeypatch):
    weight, _, hessian, codes, table = layer(rows=21)
    whole = improve(weight, codes, table, hessian, None, 3)
    monkeypatch.setattr(_codebook_descent, "_ELEMENTS", 5 * 40 * 4)
    parts = improve(weight, codes, table, hessian, None, 3)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


def test_damping():
    gram = torch.diag(torch.tensor([4.0, 0.0, 2.0]))
    assert damped(gram, 0.1).diagonal().tolist() == pytest.approx([4.3, 3.0, 2.3])
    assert torch.equal(damped(torch.zeros(2, 2), 0.1), torch.eye(2))


def test_the_whole_correction_is_the_least_squares_solution():
    weight, y, _, _, _ = layer()
    x = y + 0.1 * torch.randn_like(y)
    gram, cross = x.T @ x, y.T @ x
    hessian = damped(gram, 1e-4)
    target = shifted(weight, cross, gram, hessian, 1.0)
    best = torch.linalg.lstsq(x.double(), (y @ weight.T).double()).solution.T
    torch.testing.assert_close(target.double(), best, rtol=1e-2, atol=1e-2)
    half = shifted(weight, cross, gram, hessian, 0.5)
    torch.testing.assert_close(half, (weight + target) / 2)
    torch.testing.assert_close(shifted(weight, gram, gram, hessian, 1.0), weight)
