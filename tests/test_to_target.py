"""Targets by name and by place, with their options; guests' targets from the command line to the report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler import api
from qcompiler.errors import TargetError, VerificationError
from qcompiler.lowering import targets
from qcompiler.lowering.kernels import KernelsTarget
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.passes import RTN, QuantizeKVCache
from qcompiler.to_target import describe_targets, make_target
from tests.tiny_checkpoint import command
from tests.tiny_graphs import language_model

GUEST = '''
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from qcompiler.extend import Graph, Lowered, Reader, Scheme, Support, Target

FACTOR = {factor}

@dataclass(frozen=True)
class Names(Target):
    """A list of layers."""
    capitals: bool = False
    name: ClassVar[str] = "names"
    main_file: ClassVar[str | None] = "names.txt"

    def supports(self, scheme: Scheme, width: int) -> Support:
        if scheme.weight is not None and scheme.weight.bits < 4:
            return Support("refused", "4 bits and more")
        return Support("writes-only")

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        names = [site.name.upper() if self.capitals else site.name for site in graph.sites()]
        (directory / "names.txt").write_text("\\n".join(names))
        return Lowered({{"notes": ["a list"], "bytes": 1}}, readers=[Reader(lambda: Twin(graph))])

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        return (directory / "names.txt").is_file()

class Twin:
    """The native artifact, off by a factor."""
    def __init__(self, graph):
        from qcompiler.artifacts import NativeArtifact
        self.native, self.path = NativeArtifact(graph), None
    def __getattr__(self, name):
        return getattr(self.native, name)
    def forward(self, ids):
        return FACTOR * self.native.forward(ids)

INSTANCE = Names(capitals=True)
NUMBER = 3
class Nameless(Names):
    name = "native"
class Unmade(Target):
    name = "unmade"
'''


@pytest.fixture
def guest(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, factor: float = 1.0) -> str:
        path = tmp_path / f"guest_{str(factor).replace('.', '_')}.py"
        path.write_text(GUEST.format(factor=factor))
        return f"{path}:{name}"

    return write


@pytest.mark.parametrize(
    ("text", "options", "made"),
    [
        ("onnx", {}, OnnxTarget()),
        ("onnx:opset=23,float=float16", {}, OnnxTarget(23, "float16")),
        ("onnx:opset=23", {"float_dtype": "float16"}, OnnxTarget(23, "float16")),
        (OnnxTarget(24), {"float_dtype": "float16"}, OnnxTarget(24, "float16")),
        ("kernels:dtype=bfloat16,tune=true,device=cpu", {}, KernelsTarget("cpu", "bfloat16", tune=True)),
        ("kernels:dtype=none", {}, KernelsTarget()),
    ],
    ids=str,
)
def test_targets_by_name(text: Any, options: dict[str, Any], made: object) -> None:
    assert make_target(text, **options) == made


@pytest.mark.parametrize(
    ("text", "where", "got"),
    [
        ("tpu", None, "tpu"),
        ("onnx:opset=9", None, "9"),
        ("onnx:opset=new", "OnnxTarget.opset", "'new'"),
        ("onnx:float_dtype=int8", "OnnxTarget.float_dtype", "'int8'"),
        ("onnx:colour=red", "OnnxTarget", "colour"),
        ("onnx:opset", None, "onnx:opset"),
        ("onnx:opset=21,opset=22", None, "onnx:opset=21,opset=22"),
        ("onnx:opset=21,ops=22", "OnnxTarget", "ops"),
        ("kernels:device=tpu", None, "tpu"),
        ("nowhere.py:TARGET", "nowhere.py", None),
    ],
)
def test_no_targets(text: str, where: str | None, got: object) -> None:
    with pytest.raises(TargetError) as caught:
        make_target(text)
    assert (None if caught.value.where is None else str(caught.value.where), caught.value.got) == (where, got)


def test_an_option_as_a_value_that_it_has_not() -> None:
    with pytest.raises(TargetError, match="unknown option") as caught:
        make_target("onnx", opsett=23)
    assert caught.value.remedy == "did you mean opset?"
    assert "opset (int)" in str(caught.value.expected)


def test_what_is_told_of_targets() -> None:
    told = {target["name"]: target for target in describe_targets()}
    assert list(told) == [cls.name for cls in targets()] == ["ort", "onnx", "tensorrt", "checkpoint", "kernels"]
    assert told["onnx"]["missing"] == []
    assert [told[name]["writes"] for name in told] == ["ort.json", "model.onnx", "layers.json", "config.json", None]
    for target in told.values():
        assert target["summary"].endswith(".")
        assert all(option["help"] and option["values"] and option["default"] for option in target["options"])
    outcome = command("targets", "--json")
    assert (outcome.status, outcome.result["targets"]) == (0, json.loads(json.dumps(describe_targets())))
    shown = command("targets").output
    assert "opset=21" in shown
    assert "nothing is missing" in shown


def test_what_a_target_misses_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxTarget, "packages", {"onnx": "onnx", "no_such_module": "no-such-package"})
    assert OnnxTarget.missing_packages() == ["no-such-package"]
    assert "pip install no-such-package" in command("targets").output


def test_a_guest_s_target(guest: Callable[..., str], tmp_path: Path) -> None:
    result = qc.compile(language_model(), [RTN(bits=4)], targets=guest("Names"))
    written = qc.lower(result, guest("Names"), tmp_path / "names", capitals=True)
    assert (tmp_path / "names" / "names.txt").read_text().isupper()
    assert written["parity"]["max_difference"] == 0
    assert result.report.targets["names"] == written
    qc.lower(result, f"{guest('Names')}:capitals=false", tmp_path / "low", verify=False)
    assert (tmp_path / "low" / "names.txt").read_text().islower()
    qc.lower(result, guest("INSTANCE"), tmp_path / "instance")
    assert (tmp_path / "instance" / "names.txt").read_text().isupper()
    with pytest.raises(TargetError, match="does not take this scheme"):
        qc.compile(language_model(), [RTN(bits=3)], targets=[guest("Names")])
    with pytest.raises(TargetError, match="does not take this scheme"):
        qc.lower(qc.compile(language_model(), [RTN(bits=3)]), guest("Names"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    tokens = qc.Calibration.from_tokens(torch.arange(24).reshape(2, 12))
    cached = qc.compile(language_model(), [QuantizeKVCache("int8")], tokens)
    with pytest.raises(TargetError, match="does not take a cache") as caught:
        qc.lower(cached, guest("Names"), tmp_path / "cached")
    assert (caught.value.where, caught.value.got) == ("names", "int8 per token symmetric")
    with pytest.raises(VerificationError):
        qc.lower(result, guest("Names", 1.01), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("NUMBER", "this is no target"),
        ("Twin", "this is no target"),
        ("Target", "this is no target"),
        ("Nameless", "a target needs a name"),
        ("Unmade", "this target cannot be made"),
        ("Missing", "no such name"),
    ],
)
def test_what_is_no_target_of_a_guest(name: str, what: str, guest: Callable[..., str]) -> None:
    with pytest.raises(TargetError, match=what) as caught:
        make_target(guest(name))
    if name == "Missing":
        assert caught.value.expected == "Names, INSTANCE, Nameless, Unmade"


def test_a_guest_s_target_on_the_command_line(guest: Callable[..., str], tmp_path: Path) -> None:
    api.compile(language_model(), [RTN(bits=4)]).save(tmp_path / "out" / "native")
    convert = ("convert", tmp_path / "out", "--to", guest("Names"), "-o", tmp_path / "out")
    outcome = command(*convert, "--json")
    assert (outcome.status, outcome.result["artifacts"]) == (0, {"names": str(tmp_path / "out" / "names")})
    assert "names" in json.loads((tmp_path / "out" / "native" / "report.json").read_text())["targets"]
    assert command(*convert, "--json").status == 2
    assert command(*convert, "--overwrite").status == 0
    twice = command(*convert, "--overwrite", "--to", guest("INSTANCE"), "--json")
    assert twice.error["what"] == "a target is named twice"
