"""Expected losses: each has a source, small models lose more, unknown formats are said to be unknown."""

import pytest

from qcompiler.advisor.quality import _tables, expect_cache, expect_weights, level_of
from qcompiler.ir import CacheFormat
from qcompiler.numerics import Scheme


def test_each_has_a_source() -> None:
    for entry in (*_tables()["weights"], *_tables()["caches"]):
        assert 0 <= entry["loss"] < 1
        assert "arXiv" in entry["source"] or "measured here" in entry["source"] or "as AWQ" in entry["source"]


@pytest.mark.parametrize(
    ("scheme", "passes", "loss"),
    [
        ("w4a16", ("Assign", "AWQ", "RTN"), 0.0235),
        ("w4a16", ("Assign", "GPTQ"), 0.0288),
        ("w4a16", ("Assign", "RTN"), 0.0464),
        ("w8a8", ("Assign", "SmoothQuant", "InsertQDQ"), 0.0075),
        ("w8a8", ("Assign", "InsertQDQ"), 0.0615),
        ("fp8", ("Assign", "InsertQDQ", "GPTQ"), 0.0020),
        ("w2a16", ("Assign",), None),
    ],
)
def test_the_most_particular_entry_counts(scheme: str, passes: tuple[str, ...], loss: float | None) -> None:
    assert expect_weights(Scheme.parse(scheme), passes, 7e9).loss == loss


def test_small_models_lose_more() -> None:
    awq = ("AWQ",)
    losses = [expect_weights(Scheme.parse("w4a16"), awq, size).loss or 0 for size in (70e9, 6.7e9, 3e9, 1e9)]
    assert losses[0] == losses[1] < losses[2] < losses[3]
    assert [level_of(loss) for loss in losses] == [1, 1, 1, 2]
    assert level_of(expect_weights(Scheme.parse("w4a16"), awq, 2.9e9).loss) == 2
    assert expect_weights(Scheme.parse("fp8"), ("GPTQ",), 1e9).loss == 0.0020  # measured on a smaller one


def test_caches() -> None:
    assert expect_cache(None).loss == 0
    static, token = CacheFormat("float8_e4m3fn", scales="static"), CacheFormat("float8_e4m3fn")
    assert (expect_cache(static).loss or 0) > (expect_cache(token).loss or 0) > 0
    assert expect_cache(CacheFormat("int4")).loss == 0.0058
    assert expect_cache(CacheFormat("int4", scales="static")).loss is None  # nobody measured it


def test_levels() -> None:
    assert [level_of(loss) for loss in (0.0, 0.01, 0.011, 0.03, 0.1, 0.3, None)] == [0, 0, 1, 1, 2, 3, 3]
