"""README.md is up to date."""

import pytest

from docs.update_matrix import BEGIN, END, README, table, updated
from qcompiler.passes.recipes import RECIPES


def test_the_matrix_is_that_of_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == updated(text), "README.md is stale: run `make matrix`"
    for name in RECIPES:
        assert f"\n| `{name}` | " in text


def test_what_a_table_looks_like() -> None:
    matrix = {"w8a16": {"native": "runs", "onnx": "fused"}, "fp8": {"native": "runs", "onnx": "refused"}}
    expected = (
        "| recipe | native | onnx |\n| --- | --- | --- |\n| `w8a16` | runs | fused |\n| `fp8` | runs | refused |\n"
    )
    assert table(matrix).splitlines() == expected.splitlines()


def test_what_stands_around_the_table_stays() -> None:
    text = f"before\n{BEGIN}old\n{END}after\n"
    found = updated(text)
    assert found.startswith(f"before\n{BEGIN}| recipe | native |")
    assert found.endswith(f" |\n{END}after\n")
    assert updated(found) == found
    for broken in ("nothing", text + END, text.replace(BEGIN, "")):
        with pytest.raises(ValueError, match="each of these lines once"):
            updated(broken)
