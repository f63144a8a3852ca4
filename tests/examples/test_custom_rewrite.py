"""A rewrite of the graph that lies outside of the package: exact, saved, loaded and lowered."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from examples import custom_rewrite
from examples.custom_rewrite import RotateInputs
from qcompiler.errors import VerificationError
from qcompiler.extend import Graph, PassContext, PassResult, Scheme, check_pass, is_op
from qcompiler.passes import RTN, Assign
from tests.tiny_checkpoint import command, save_checkpoint, write_text

FILE = Path(custom_rewrite.__file__)
INPUTS = [(torch.randn(16, 48, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
hadamard = torch.ops.qcompiler.hadamard.default


class MLP(nn.Module):
    def __init__(self, inner: int = 80) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.gate, self.down = nn.Linear(48, inner), nn.Linear(48, inner), nn.Linear(inner, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return out


def test_it_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 60


@pytest.mark.parametrize(("pattern", "count"), [("down", 1), ("*", 2), ("[ug]*", 1)])
def test_the_function_stays_and_the_weights_do_not(pattern: str, count: int) -> None:
    checked = check_pass(RotateInputs(pattern), MLP(), INPUTS)
    assert 0 < checked.error < 1e-9
    nodes = [node for node in checked.graph.fx.nodes if is_op(node, hadamard)]
    assert len(nodes) == count  # up and gate read one value: it is rotated once
    assert all(node.meta["shape"] == node.args[0].meta["shape"] for node in nodes)


def test_nothing_fits() -> None:
    assert check_pass(RotateInputs("o_proj"), MLP(), INPUTS).error == 0
    (skip,) = check_pass(RotateInputs("down"), MLP(81), INPUTS).report.skipped
    assert "no Hadamard matrix for 81 channels" in skip.reason


class Forgetful(RotateInputs):
    """Rotates what layers read, and leaves the weights as they are."""

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        for site in graph.sites():
            graph.insert(hadamard, site.inputs[0], site.nodes, 16)
        return PassResult(modified=True)


def test_a_wrong_one_is_found_out() -> None:
    with pytest.raises(VerificationError, match="declared exact changed"):
        check_pass(Forgetful(), MLP(), INPUTS)


def test_a_layer_that_comes_behind_the_schemes_is_left_in_float() -> None:
    class Turn(RotateInputs):
        def run(self, graph: Graph, context: PassContext) -> PassResult:
            site = graph.sites()[-1]
            turn = torch.linalg.qr(torch.randn(80, 80, generator=context.generator(site)))[0]
            linear = torch.ops.qcompiler.linear.default
            graph.insert(linear, site.inputs[0], site.nodes, tensors={"turn.weight": turn})
            graph.derive_float(site.weight, lambda weight: weight.float() @ turn.T)
            return PassResult(modified=True)

    checked = check_pass([Assign("w8a16"), Turn(), RTN()], MLP(), INPUTS)
    assert checked.graph.schemes["turn"] == Scheme()
    assert sorted(site.site for site in checked.report.sites) == ["down", "gate", "up"]
    assert checked.error < 1e-3


def test_from_the_command_line_to_onnx(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path / "model", layers=1), write_text(tmp_path / "text.txt")
    options = ("--calib", text, "--samples", 8, "--length", 32, "--to", "onnx", "--json")
    command("compile", model, "-r", f"{FILE}:RECIPE", "-o", tmp_path / "out", *options)
    result = qc.load(tmp_path / "out")
    assert result.report.targets["onnx"]["parity"]["max_difference"] < 1e-4
    assert [item["pass"] for item in result.manifest["recipe"]] == ["rotate-inputs", "assign", "rtn"]
    (node,) = (node for node in result.graph.fx.nodes if is_op(node, hadamard))
    assert node.meta["shape"][:2] == ("batch", "sequence")
    ids = torch.arange(3, 12)[None]
    plain = qc.compile(model, [Assign("w4a16"), RTN()]).artifact().forward(ids)
    assert not torch.allclose(result.artifact().forward(ids), plain)
    again = qc.compile(model, [*custom_rewrite.RECIPE])
    assert torch.equal(result.artifact().forward(ids), again.artifact().forward(ids))
