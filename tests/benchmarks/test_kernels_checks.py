"""The checks of the kernels' benchmark: they hold for what is right, and for nothing else."""

import pytest
import torch

from benchmarks.kernels.caches import cache_format, random_cache
from benchmarks.kernels.checks import (
    caches as cache_checks,
)
from benchmarks.kernels.checks import (
    linear as linear_checks,
)
from benchmarks.kernels.checks import (
    model as model_checks,
)
from benchmarks.kernels.checks import (
    rows as row_checks,
)
from benchmarks.kernels.comparing import compare, compare_codes, poisoned
from benchmarks.kernels.records import Verdict
from benchmarks.kernels.sections import Bench, section_named
from qcompiler.lowering.kernels.cache import append as cache_append
from qcompiler.lowering.kernels.cache import decode_attention
from qcompiler.lowering.kernels.codebook_linear.operator import CodebookLinear
from qcompiler.lowering.kernels.scaled_linear.operator import ScaledLinear
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear

CPU = torch.device("cpu")


def held(run, expected):
    return compare("s", "n", run, expected).passed


def test_a_result_is_held_to_what_its_dtype_can_hold():
    expected = torch.tensor([1.0, -4.0])
    assert held(lambda: torch.tensor([1.0, -4.007], dtype=torch.float16), expected)
    assert not held(lambda: torch.tensor([1.0, -4.01], dtype=torch.float16), expected)
    assert held(lambda: torch.tensor([1.0, -4.01], dtype=torch.bfloat16), expected)
    assert not held(lambda: torch.tensor([1.0, -4.001]), expected)
    assert not held(lambda: torch.tensor([1.0]), expected)


def test_an_element_that_is_not_written_shows():
    def forgets():
        result = torch.empty(64, dtype=torch.float16)
        result[:63] = 1
        return result

    assert not held(forgets, torch.ones(64))
    assert held(lambda: torch.empty(64, dtype=torch.float16).fill_(1), torch.ones(64))


def test_memory_is_poisoned_in_every_dtype_and_no_longer_than_asked():
    with poisoned():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
        assert torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()
        assert torch.ones(3).new_empty(2).isnan().all()
        assert torch.empty(3, dtype=torch.int8).tolist() == [127] * 3
    assert not torch.are_deterministic_algorithms_enabled()


def test_runs_that_differ_in_a_bit_show():
    results = iter([1.0, 1.0, 1.0 + 2**-10])
    verdict = compare("s", "n", lambda: torch.tensor([next(results)], dtype=torch.float16), torch.ones(1))
    assert not verdict.passed
    assert "runs differ" in verdict.detail


def test_codes_may_be_neighbours_but_rarely():
    codes = torch.arange(2000).remainder(200).sub(100).to(torch.int8)
    near, far, many = codes.clone(), codes.clone(), codes + 1
    near[7] += 1
    far[7] += 2

    def passes(found, scale=1.0):
        others = (torch.tensor([1.0]),)
        return compare_codes("s", "n", lambda: (found, torch.tensor([scale])), codes, others).passed

    assert passes(codes)
    assert passes(near)
    assert not passes(far)
    assert not passes(many)
    assert not passes(codes.to(torch.uint8))
    assert not passes(codes, scale=1.0001)
    assert not passes(codes, scale=float("nan"))


def test_float_codes_are_neighbours_in_their_order():
    values = torch.tensor([0.0, -0.001953125, 1.0, 448.0]).repeat(1000).to(torch.float8_e4m3fn)
    moved = values.clone()
    moved.view(torch.int8)[1] = 0  # -2^-9 becomes zero
    moved.view(torch.int8)[2] += 1
    far = values.clone()
    far.view(torch.int8)[3] -= 2

    def passes(found):
        return compare_codes("s", "n", lambda: (found,), values, ()).passed

    assert passes(moved)
    assert not passes(far)


def run(module, name, match, **options):
    """The verdicts of the cases of a module whose name holds ``match``."""
    bench = Bench(section_named(name), CPU, quick=True, **options)
    cases = [case for case in module.cases(bench) if match in case.name]
    assert cases
    records = [record for case in cases for record in case.run(bench)]
    assert records
    assert all(isinstance(record, Verdict) for record in records)
    return records


def broken_linear(forward):
    """A layer whose last output channel is off by a hundredth of the largest result."""

    def wrong(self, *arguments):
        result = forward(self, *arguments).clone()
        if result.numel():
            result[..., -1] += 0.02 * result.abs().max()
        return result

    return wrong


@pytest.mark.parametrize(
    ("layer", "match"), [(WeightOnlyLinear, "weight-only"), (ScaledLinear, "scaled"), (CodebookLinear, "codebook")]
)
def test_checks_of_layers_hold_and_can_fail(layer, match, monkeypatch):
    assert all(verdict.passed for verdict in run(linear_checks, f"check-{match}", match))
    monkeypatch.setattr(layer, "forward", broken_linear(layer.forward))
    verdicts = run(linear_checks, f"check-{match}", match)
    assert [v.name for v in verdicts if v.passed and ": 0x" not in v.name] == []


class Wrong:
    """The operators, one of them giving codes that are two too large where there are any."""

    def __init__(self, operators, broken):
        self._operators, self._broken = operators, broken

    def __getattr__(self, name):
        operator = getattr(self._operators, name)
        if name != self._broken:
            return operator

        def wrong(*arguments):
            found = operator(*arguments)
            codes, *others = found if isinstance(found, (list, tuple)) else (found,)
            codes = (codes.view(torch.int8) ^ 2).view(codes.dtype)
            return (codes, *others) if others else codes

        return wrong


@pytest.mark.parametrize("operator", list(row_checks._CHECKS))
def test_checks_of_quantizers_hold_and_can_fail(operator, monkeypatch):
    match = f"{operator} "
    right = [v for v in run(row_checks, "check-rows", match) if v.name.startswith(match)]
    assert all(verdict.passed for verdict in right)
    wrong = Wrong(torch.ops.qcompiler_kernels, operator)
    monkeypatch.setattr(row_checks, "_ours", lambda: wrong)
    verdicts = [v for v in run(row_checks, "check-rows", match) if v.name.startswith(match)]
    assert len(verdicts) >= 9
    assert [v.name for v in verdicts if v.passed and ": 0x" not in v.name] == []


def test_checks_of_appending_hold_and_can_fail(monkeypatch):
    assert all(verdict.passed for verdict in run(cache_checks, "check-cache", "append to"))

    def one_too_early(reference):
        def wrong(new, codes, scale, zero, start, *options):
            reference(new, codes, scale, zero, start - 1, *options)

        return wrong

    for name in ("append_quantized_reference", "append_static_reference"):
        monkeypatch.setattr(cache_append, name, one_too_early(getattr(cache_append, name)))
    assert not any(verdict.passed for verdict in run(cache_checks, "check-cache", "append to"))


def test_checks_of_attention_hold_and_can_fail(monkeypatch):
    assert all(verdict.passed for verdict in run(cache_checks, "check-cache", "attention over"))
    reference = decode_attention.decode_attention_reference

    def wrong(q, *arguments):
        return reference(q * 1.2, *arguments)

    monkeypatch.setattr(decode_attention, "decode_attention_reference", wrong)
    verdicts = run(cache_checks, "check-cache", "attention over")
    assert sum(not verdict.passed for verdict in verdicts) > 0.9 * len(verdicts)


@pytest.mark.parametrize("name", ["float16", "int8", "int4 asym g32", "fp8 static", "int8 asym static"])
def test_random_caches_are_those_the_operators_take(name):
    spec = cache_format(name)
    generator = torch.Generator().manual_seed(0)
    cache = random_cache(spec, (2, 3, 40, 64), torch.float16, generator)
    side = decode_attention.Side.of("k", cache.codes, cache.scale, cache.zero, cache.dtype)
    assert (side.spec is None) is (spec is None)
    if spec is not None:
        assert (side.spec.dtype, side.spec.scales) == (spec.dtype, spec.scales)
        assert side.spec.symmetric is spec.symmetric
    values = side.dequantized()
    assert values.shape == (2, 3, 40, 64)
    assert 0.5 < float(values.std()) < 3
    if spec is not None and spec.scales == "per_token":
        assert cache.nbytes == 2 * 40 * spec.bytes_per_token(3, 64)


class MadeUpModel:
    """Gives the logits it was told to, a step at a time or all at once, and adds noise to what it is told to."""

    def __init__(self, logits, noise=(0.0, 0.0)):
        self.logits, self.noise, self.report = logits, noise, {"sites": []}

    def _noisy(self, logits, size):
        return logits + size * torch.randn(logits.shape)

    def forward(self, ids):
        return self._noisy(self.logits, self.noise[0])

    def prefill(self, ids):
        return self._noisy(self.logits[:, : ids.shape[1]], self.noise[1]), ids.shape[1]

    def step(self, ids, cache):
        return self._noisy(self.logits[:, cache : cache + 1], self.noise[1]), cache + 1


def test_a_model_is_held_to_its_graph_at_once_and_token_by_token():
    ids = torch.zeros(2, model_checks._LENGTH, dtype=torch.int64)
    logits = torch.randn(2, model_checks._LENGTH, 50)
    bench = Bench(section_named("check-model"), CPU)

    def passed(model):
        verdicts = model_checks._verdicts(bench, "m", model, ids, logits.log_softmax(-1), 1e-3)
        return [verdict.passed for verdict in verdicts]

    assert passed(MadeUpModel(logits + 7)) == [True, True, True]
    assert passed(MadeUpModel(logits, (0.3, 0.0))) == [False, False, True]
    assert passed(MadeUpModel(logits, (0.0, 0.3))) == [True, True, False]


def test_recipes_that_models_are_checked_with_are_named():
    assert [case.name for case in model_checks.cases(Bench(section_named("check-model"), CPU))] == [
        f"model {recipe}" for recipe in model_checks.RECIPES
    ]
