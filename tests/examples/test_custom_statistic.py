"""A statistic that lies outside of the package chooses ranges of activations."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from examples import custom_statistic
from examples.custom_statistic import AverageRange
from qcompiler.extend import RangeStatistic, check_pass
from qcompiler.numerics import QuantSpec
from qcompiler.passes import RTN, Assign, InsertQDQ
from tests.tiny_checkpoint import command, save_checkpoint, write_text

FILE = Path(custom_statistic.__file__)
INT8 = QuantSpec("int8", "per_tensor", None, symmetric=False)


def rows(seed: int, count: int = 64) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


def test_it_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 60


def test_what_it_says_does_not_depend_on_batches() -> None:
    whole, parts, other = AverageRange(), AverageRange(), AverageRange()
    whole.update(rows(0))
    parts.update(rows(0)[:10].reshape(2, 5, 48))
    other.update(rows(0)[10:])
    parts.merge(other)
    expected = (1.5 * float(rows(0).amin(-1).mean()), 1.5 * float(rows(0).amax(-1).mean()))
    assert whole.range(INT8) == pytest.approx(expected)
    assert parts.range(INT8) == pytest.approx(expected)
    kind: type[RangeStatistic] = AverageRange
    with pytest.raises(qc.QCompilerError, match="nothing was observed"):
        kind().range(INT8)


def test_its_range_is_used_and_one_token_does_not_make_it() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 32))
    loud = torch.cat([rows(1), 40 * rows(2, 1)])
    own = check_pass([Assign("w8a8"), RTN(), InsertQDQ(AverageRange, least_sqnr_db=-math.inf)], model, [(loud,)])
    (report,) = (site for site in own.report.sites if site.method == "insert-qdq")
    seen = AverageRange()
    seen.update(loud)
    assert report.details["observer"] == "AverageRange"
    assert report.details["range"] == pytest.approx(seen.range(INT8))
    assert report.details["seen"] == pytest.approx([float(loud.min()), float(loud.max())])
    scale = float(own.graph.weights.read("0.input_scale"))
    low, high = report.details["range"]
    assert scale == pytest.approx((high - low) / 255, rel=0.01)


def test_from_the_command_line(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path / "model", layers=1), write_text(tmp_path / "text.txt")
    options = ("--calib", text, "--samples", 8, "--length", 32)
    outcome = command(
        "compile", model, "-r", f"{FILE}:RECIPE", "--to", "onnx", "-o", tmp_path / "out", *options, "--json"
    )
    assert set(outcome.result["artifacts"]) == {"native", "onnx"}
    result = qc.load(tmp_path / "out")
    assert result.manifest["recipe"][-1]["options"]["observer"] == "AverageRange"
    named = {site.details["observer"] for site in result.report.sites if site.method == "insert-qdq"}
    assert named == {"AverageRange"}
    assert "AverageRange" in (tmp_path / "out" / "native" / "report.html").read_text()
    (tmp_path / "mine.py").write_text(FILE.read_text())
    recipe = tmp_path / "recipe.toml"
    passes = ('use = "Assign"\nscheme = "w8a8"', 'use = "RTN"', 'use = "InsertQDQ"\nobserver = "mine.py:AverageRange"')
    recipe.write_text("".join(f"[[passes]]\n{text}\n" for text in passes))
    command("compile", model, "-r", recipe, "-o", tmp_path / "again", *options, "--json")
    again = qc.load(tmp_path / "again")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again.artifact().forward(ids), result.artifact().forward(ids))
