"""A rounding that lies outside of the package does all that the built-in ones do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from examples import custom_rounding
from examples.custom_rounding import GreedyRounding
from qcompiler.passes import RTN, Assign, InsertQDQ
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.testing import check_pass
from tests.tiny_checkpoint import command, save_checkpoint, write_text

FILE = Path(custom_rounding.__file__)
MIXING = torch.randn(48, 48, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -2, 48)
INPUTS = [(torch.randn(64, 48, generator=torch.Generator().manual_seed(i)) @ MIXING.T,) for i in range(3)]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def test_it_is_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w3a16-channel-asym", "w8a16", "w4a16-g20", "w2a16-tensor"])
def test_it_beats_rounding_to_nearest_and_says_so_truly(scheme: str) -> None:
    nearest, moved = (check_pass([Assign(scheme), item], MLP(), INPUTS) for item in (RTN(), GreedyRounding()))
    assert moved.error < 0.7 * nearest.error
    for site in moved.report.sites:
        assert site.output_error is not None
        assert site.rtn_output_error is not None
        assert 0 < site.output_error < site.rtn_output_error
    first = moved.report.sites[0]
    module = MLP()
    rows = torch.cat([x for (x,) in INPUTS])
    weight = module.up.weight.detach()
    for error, graph in ((first.output_error, moved.graph), (first.rtn_output_error, nearest.graph)):
        codes, scale = (graph.weights.read(f"up.weight_{name}").float() for name in ("codes", "scale"))
        zero = graph.weights.read("up.weight_zero_point").float() if "asym" in scheme else torch.zeros_like(scale)
        if scale.dim() == 2:
            size = 16 if scheme.endswith("g16") else 20
            scale, zero = (t.repeat_interleave(size, 1)[:, :48] for t in (scale, zero))
        elif scale.dim() == 1:
            scale, zero = scale[:, None], zero[:, None]
        rounded = (codes - zero) * scale
        expected = (rows @ (weight - rounded).T).square().sum() / (rows @ weight.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)


def test_more_sweeps_are_no_worse() -> None:
    errors = []
    for sweeps in (1, 2, 4):
        checked = check_pass([Assign("w3a16-g16"), GreedyRounding(sweeps)], MLP(), INPUTS)
        errors.append(checked.report.sites[0].output_error or 0)
    assert errors[2] <= errors[1] < errors[0]


def test_a_channel_that_calibration_never_saw_is_rounded_to_nearest() -> None:
    def blind(x: Tensor) -> tuple[Tensor]:
        return (torch.where(torch.arange(48) == 5, 0.0, x),)

    nearest, moved = (
        check_pass([Assign("w4a16-channel"), item], MLP(), [blind(x) for (x,) in INPUTS])
        for item in (RTN(), GreedyRounding())
    )
    columns = [checked.graph.weights.read("up.weight_codes")[:, 5] for checked in (nearest, moved)]
    assert torch.equal(*columns)


def test_it_composes() -> None:
    recipe = [Assign("w8a8", overrides={"up": None}), GreedyRounding(), InsertQDQ()]
    checked = check_pass(recipe, MLP(), INPUTS)
    assert [(site.method, site.site) for site in checked.report.sites] == [
        ("greedy-rounding", "down"),
        ("insert-qdq", "down"),
    ]
    assert len(Pipeline(recipe).stages) == 1


def test_float_codes_are_left_alone() -> None:
    checked = check_pass([Assign("fp8", overrides={"down": "w8a8"}), GreedyRounding(), InsertQDQ()], MLP(), INPUTS)
    assert [(skip.site, skip.reason) for skip in checked.report.skipped] == [
        ("up", "float codes are not evenly spaced")
    ]
    assert {site.site for site in checked.report.sites} == {"down"}


def test_from_the_command_line_to_onnx(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path / "model", layers=1), write_text(tmp_path / "text.txt")
    options = ("--calib", text, "--samples", 8, "--length", 32, "--set", "*.down_proj=w8a16", "--to", "onnx", "--json")
    outcome = command("compile", model, "-r", f"{FILE}:RECIPE", "-o", tmp_path / "out", *options)
    sites = outcome.result["sites"]
    assert {site["method"] for site in sites} == {"greedy-rounding"}
    assert len(sites) == 7
    assert sum(site["output_error"] for site in sites) < 0.7 * sum(site["rtn_output_error"] for site in sites)
    result = qc.load(tmp_path / "out")
    assert result.report.targets["onnx"]["parity"]["max_difference"] < 1e-4
    assert [item["pass"] for item in result.manifest["recipe"]] == ["assign", "greedy-rounding"]
    assert "greedy-rounding" in (tmp_path / "out" / "native" / "report.html").read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[passes]]\nuse = "Assign"\n[[passes]]\nuse = "{FILE}:GreedyRounding"\nsweeps = 2\n')
    again = command("compile", model, "-r", recipe, "-o", tmp_path / "again", *options[:-3], "--json")
    assert sum(site["output_error"] for site in again.result["sites"]) < sum(site["output_error"] for site in sites)
