"""What was compiled stands, whatever comes behind: places that outputs go to, and targets that fail early and late."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler import to_target
from qcompiler.errors import MissingDependencyError, TargetError, VerificationError
from qcompiler.sweep import compiling
from tests.tiny_checkpoint import Outcome, command, file_bytes, save_checkpoint

NATIVE = {"manifest.json", "graph.json", "report.json", "report.html", "weights.safetensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", layers=1)


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    """An output with a native artifact alone."""
    out = model.parent / "out"
    assert command("compile", model, "-r", "w8a16", "-o", out, "--json").result["artifacts"] == {
        "native": str(out / "native")
    }
    return out


def compile_to(output: Path | str, model: Path, *options: object) -> Outcome:
    return command("compile", model, "-r", "w8a16", "-o", output, "--json", *options)


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def check_whole(native: Path) -> None:
    assert set(names(native)) >= NATIVE
    assert not [name for name in names(native) if name.startswith(".")]
    assert qc.load(native).artifact().forward(torch.arange(8)[None]).isfinite().all()


def standing(outcome: Outcome) -> tuple[dict[str, str], str]:
    """The artifacts that an error says stand, and the command it gives for the rest."""
    error = outcome.fields["error"]
    assert all(path in outcome.errors for path in error["artifacts"].values())
    assert error["next_command"] in outcome.errors
    return error["artifacts"], error["next_command"]


# --- places ----------------------------------------------------------------------------------------------------------


def test_the_working_directory_with_files_in_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may be among them: nothing that is not ours is touched."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "README.md").write_text("mine")
    before = file_bytes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for options in ((), ("--overwrite",)):
        assert compile_to(".", Path("model"), "--to", "onnx", *options).result["artifacts"] == {
            "native": "native",
            "onnx": "onnx",
        }
        assert names(tmp_path) == ["README.md", "model", "native", "onnx"]
        assert before.items() <= file_bytes(tmp_path).items()
        saved = json.loads((tmp_path / "native" / "report.json").read_text())
        assert saved["targets"]["onnx"]["path"] == "onnx"
        assert saved["targets"]["onnx"]["parity"]["max_difference"] < 1e-3
    assert compile_to(".", Path("model"), "--overwrite").status == 0
    assert names(tmp_path) == ["README.md", "model", "native"]  # what was made of the old one is outdated


def test_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert compile_to(tmp_path / "out", model, "--to", "onnx").status == 0
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["native", "onnx"]
    check_whole(tmp_path / "out" / "native")


def test_saving_and_lowering_into_links_and_the_working_directory(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = qc.load(compiled)
    for name in ("native", "onnx", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-link").symlink_to(name)
    result.save(tmp_path / "native-link")
    written = qc.lower(result, "onnx", tmp_path / "onnx-link")
    assert written["path"] == str(tmp_path / "onnx-link")
    assert (tmp_path / "native-link").is_symlink()
    assert (tmp_path / "onnx-link").is_symlink()
    check_whole(tmp_path / "native")
    assert "model.onnx" in names(tmp_path / "onnx")
    monkeypatch.chdir(tmp_path / "here")
    qc.lower(result, "onnx", ".", verify=False)
    assert file_bytes(tmp_path / "here") == file_bytes(tmp_path / "onnx")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of its own."""
    path = tmp_path / "mounted"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_mount_point(compiled: Path, model: Path, mounted: Path) -> None:
    (mounted / "lost+found").mkdir()
    assert compile_to(mounted, model).status == 0
    check_whole(mounted / "native")
    shutil.rmtree(mounted / "native")
    result = qc.load(compiled)
    result.save(mounted)
    check_whole(mounted)


def test_a_disk_that_fills_up(model: Path, mounted: Path) -> None:
    """Room for the native artifact, not for ONNX, whose embedding is in float32."""
    outcome = compile_to(mounted, model, "--to", "onnx")
    assert (outcome.status, outcome.error["type"]) == (2, "ResourceError")
    assert standing(outcome)[0] == {"native": str(mounted / "native")}
    assert names(mounted) == ["native"]
    check_whole(mounted / "native")


def test_a_file_that_gets_too_large(model: Path, tmp_path: Path) -> None:
    """As a disk that fills up; the same holds where nothing can be mounted."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000)); "
        "from qcompiler.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = ["compile", str(model), "-r", "w8a16", "-o", str(out), "--to", "onnx:opset=23", "--json"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert (outcome.status, outcome.error["type"]) == (2, "ResourceError")
    assert standing(outcome)[1] == f"qcompiler convert {out / 'native'} --to onnx:opset=23 -o {out}"
    assert names(out) == ["native"]
    check_whole(out / "native")


def test_an_output_that_changes_meanwhile(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify: Any = vars(compiling)["verify_graph"]

    def change(*arguments: Any) -> None:
        (tmp_path / "out" / "native").mkdir()
        (tmp_path / "out" / "native" / "theirs").write_text("theirs")
        verify(*arguments)

    monkeypatch.setattr(compiling, "verify_graph", change)
    outcome = compile_to(tmp_path / "out", model, "--to", "onnx", "--overwrite")
    assert (outcome.status, outcome.error["type"]) == (2, "InputError")
    kept, following = standing(outcome)
    assert kept == {"native": str(tmp_path / "out" / "native-2")}
    check_whole(tmp_path / "out" / "native-2")
    assert names(tmp_path / "out" / "native") == ["theirs"]
    assert command(*following.split()[1:], "--json").result["artifacts"] == {"onnx": str(tmp_path / "out" / "onnx")}


# --- targets that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (VerificationError("what was written computes something else"), 3, "VerificationError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError"),
    ],
)
def test_a_target_that_fails_late(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, kind: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(to_target, "check_parity", fail)
        outcome = compile_to(out, model, "--to", "onnx:opset=23")
    assert (outcome.status, outcome.error["type"]) == (status, kind)
    kept, following = standing(outcome)
    assert kept == {"native": str(out / "native")}
    assert names(out) == ["native"]
    check_whole(out / "native")
    again = command(*following.split()[1:], "--json").result
    assert again["artifacts"] == {"onnx": str(out / "onnx")}
    assert json.loads((out / "native" / "report.json").read_text())["targets"]["onnx"]["opset"] == 23
    assert names(out) == ["native", "onnx"]


@pytest.fixture
def with_unknown_operator(tmp_path: Path, model: Path) -> Path:
    """A model that computes something with an operator that has no ONNX form."""
    root = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((root / "config.json").read_text())
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n"
        "    config_class = OwnConfig\n"
        "    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n"
        "        out['logits'] = out['logits'] + 1e-3 * out['logits'].lgamma().clamp(-1, 1)\n"
        "        return out\n"
    )
    (root / "own.py").write_text(code)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": auto, "architectures": ["OwnForCausalLM"]}
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_an_operator_without_onnx_form_is_found_before_calibration(
    with_unknown_operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("qcompiler.sweep.compiling.calibration_batches", never)
    arguments = ("compile", with_unknown_operator, "-r", "w4a16-gptq", "-o", tmp_path / "out", "--trust-remote-code")
    outcome = command(*arguments, "--to", "onnx", "--json")
    assert (outcome.status, outcome.error["type"]) == (2, "TargetError"), outcome.error
    assert "aten.lgamma" in outcome.error["got"]
    assert "lgamma, near lm_head.weight" in outcome.error["where"]
    assert outcome.fields["error"]["artifacts"] is None
    assert not (tmp_path / "out").exists()


def test_what_a_module_computes_is_found_before_calibration() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.special.bessel_j0(torch.lgamma(self.first(x))))

    graph = qc.capture(Net(), (torch.ones(2, 16),))
    with pytest.raises(TargetError, match="these operators have no ONNX form") as caught:
        qc.compile(graph, [], targets=["onnx"])
    assert caught.value.got == "aten.lgamma.default, aten.special_bessel_j0.default"
    assert str(caught.value.where).endswith("near first.weight") or "first" in str(caught.value.where)


def test_dtypes_without_onnx_form_are_found_before_calibration() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.complex64).real

    graph = qc.capture(Net(), (torch.ones(2, 16),))
    with pytest.raises(TargetError):
        qc.compile(graph, [], targets=["onnx"])


@pytest.mark.parametrize(
    "package", ["onnx_ir", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "onnxruntime"))]
)
def test_missing_packages_are_found_before_calibration(
    model: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("qcompiler.lowering.onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("qcompiler.sweep.compiling.calibration_batches", lambda *_: pytest.fail("calibrated"))
    graph = qc.capture(model)
    with pytest.raises(MissingDependencyError, match="pip install"):
        qc.compile(graph, "w4a16-gptq", targets=["onnx"])


def test_a_damaged_file_of_the_model_is_found_before_calibration(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(model, tmp_path / "model"))
    graph = qc.capture(root)
    (root / "generation_config.json").write_text("{")
    monkeypatch.setattr("qcompiler.sweep.compiling.calibration_batches", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(qc.QCompilerError, match="not a JSON object"):
        qc.compile(graph, "w4a16-gptq", targets=["onnx"])


GUEST = """
import torch
from dataclasses import dataclass
from typing import ClassVar
from qcompiler.protocol.pass_base import Effect, Pass, PassResult

@dataclass(frozen=True)
class AddUnknown(Pass):
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def run(self, graph, context):
        logits = graph.outputs[0]
        with graph.fx.inserting_after(logits):
            added = graph.fx.call_function(torch.ops.aten.lgamma.default, (logits,))
        added.meta.update(logits.meta)
        logits.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        return PassResult(True)

RECIPE = (AddUnknown(),)
"""


def test_an_operator_that_a_guests_pass_adds_leaves_native_standing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "guest.py").write_text(GUEST)
    arguments = ("-r", f"{tmp_path / 'guest.py'}:RECIPE", "-o", tmp_path / "out", "--to", "onnx", "--json")
    outcome = command("compile", model, *arguments)
    assert (outcome.status, outcome.error["type"]) == (2, "TargetError")
    assert outcome.error["got"] == "aten.lgamma.default"
    assert standing(outcome)[0] == {"native": str(tmp_path / "out" / "native")}
    check_whole(tmp_path / "out" / "native")
