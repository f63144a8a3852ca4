"""The composition root from Python: what `qcompiler` exports, on tiny models."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import qcompiler as qc
from qcompiler import api, to_target
from qcompiler.errors import (
    ArtifactError,
    CalibrationError,
    InputError,
    RecipeError,
    TargetError,
    VerificationError,
)
from qcompiler.ir.graph import Graph
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.protocol.pass_base import (
    Effect,
    Pass,
    PassContext,
    PassResult,
    Skip,
    Wave,
)
from qcompiler.sweep import compiling
from tests.models import build, run
from tests.tiny_checkpoint import file_bytes
from tests.tiny_graphs import chain, language_model

ROWS = torch.randint(32, (6, 12), generator=torch.Generator().manual_seed(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.gelu(self.up(x) * y))
        return out


def test_a_plain_module_is_calibrated_with_its_inputs_saved_and_run(tmp_path: Path) -> None:
    module = MLP().eval()
    batches = [(torch.randn(16, 24), torch.rand(16, 40)) for _ in range(3)]
    graph = qc.capture(module, batches[0])
    result = qc.compile(graph, [GPTQ(bits=4, group_size=8)], batches, device="cpu")
    assert [site.site for site in result.report.sites] == ["up", "down"]
    assert {site.details["calibration_rows"] for site in result.report.sites} == {48}
    assert result.report.calibration == {"source": "inputs", "samples": 3}
    names = [port.name.replace(".", "_") for port in graph.signature.inputs]
    inputs = dict(zip(names, batches[0], strict=True))
    (found,) = run(result.graph, **inputs).values()
    expected = module(*batches[0]).detach()
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    (again,) = run(loaded.graph, **inputs).values()
    assert torch.equal(again, found)
    with pytest.raises(InputError, match="does not predict next tokens"):
        loaded.artifact()


def test_one_graph_is_compiled_as_often_as_wanted(tmp_path: Path) -> None:
    graph = language_model()
    before, bytes_before = graph.to_dict(), graph.weights.stored_bytes()
    calibration = qc.Calibration.from_tokens(ROWS)
    recipes: list[list[Pass]] = [[GPTQ(bits=4, group_size=8)], [RTN(bits=8)], [GPTQ(bits=4, group_size=8)]]
    results = [qc.compile(graph, recipe, calibration, device="cpu") for recipe in recipes]
    for result in results[:2]:
        assert result.graph is not graph
        assert len(result.report.sites) == 14
    first, again = (result.artifact().forward(ROWS) for result in (results[0], results[2]))
    assert torch.equal(first, again)
    assert not torch.equal(first, results[1].artifact().forward(ROWS))
    del results, result
    gc.collect()  # the files that rewritten weights lay in are gone
    assert (graph.to_dict(), graph.weights.stored_bytes()) == (before, bytes_before)
    for name in graph.weight_names():
        graph.weights.read(name)


@pytest.mark.parametrize("calibration", [None, qc.Calibration.from_tokens(ROWS)])
def test_a_module_without_tokens_needs_its_inputs(calibration: Any) -> None:
    with pytest.raises(CalibrationError, match="its own inputs"):
        qc.compile(chain(), [GPTQ(bits=4)], calibration)


@pytest.mark.parametrize(
    ("batches", "where"),
    [
        ([torch.randn(1, 8)], "calibration[0]"),
        ([(torch.randn(3, 8),), [1.0]], "calibration[1]"),
        ([(torch.randn(8),)], "calibration[0]: x"),
        ([(torch.randn(3, 9),)], "calibration[0]: x"),
        ([(torch.ones(3, 8, dtype=torch.int64),)], "calibration[0]: x"),
        ([(torch.randn(3, 8),), (torch.full((3, 8), torch.nan),)], "calibration[1]: x"),
    ],
)
def test_inputs_that_do_not_fit_a_module(batches: Any, where: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        qc.compile(chain(), [GPTQ(bits=4)], batches)
    assert caught.value.where == where


@pytest.mark.parametrize("batches", [[], [(torch.randn(3, 8), torch.randn(3, 8))]])
def test_too_few_or_too_many_inputs(batches: Any) -> None:
    with pytest.raises((CalibrationError, InputError)):
        qc.compile(chain(), [GPTQ(bits=4)], batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_precision(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).to(dtype)
    batches = [(torch.randn(16, 8, dtype=dtype),)]
    result = qc.compile(qc.capture(module, batches[0]), [GPTQ(bits=4)], batches)
    assert [site.site for site in result.report.sites] == ["0", "2"]


def test_a_language_model_needs_tokens() -> None:
    with pytest.raises(CalibrationError, match="with tokens"):
        qc.compile(language_model(), [GPTQ(bits=4)], [(ROWS,)])


def test_report_and_manifest(tmp_path: Path) -> None:
    graph = language_model(tied=False)
    before = graph.weights.stored_bytes(graph.weight_names())
    seen: list[tuple[int, int, str]] = []
    result = qc.compile(
        graph,
        [GPTQ(bits=4, group_size=8)],
        qc.Calibration.from_tokens(ROWS),
        seed=7,
        progress=lambda *event: seen.append(event),
    )
    report = result.report
    assert report.bytes_before == before
    assert report.bytes_after == result.graph.weights.stored_bytes(result.graph.weight_names()) < before
    assert report.sweeps == 1
    assert [skip.site for skip in report.skipped] == ["head"]
    steps = [call for call in seen if call[1]]
    assert "calibration" in [call[2] for call in seen if not call[1]]
    assert steps[0][:2] == (0, report.segments)
    assert seen[-1] == (report.segments, report.segments, "")
    assert result.manifest["seed"] == 7
    assert [item["pass"] for item in result.manifest["recipe"]] == ["assign", "gptq"]
    assert result.manifest["recipe"][1]["options"]["bits"] == 4
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out" / ".")
    assert loaded.report == report
    assert loaded.artifact().bits_per_weight() == pytest.approx(report.bits_per_weight)


def test_overrides_are_added_to_the_recipe() -> None:
    overrides = {"*.down": "w8a16", "0.q": None}
    for recipe in ([RTN(bits=4)], [Assign("w4a16"), RTN()], [Assign("w4a16", overrides={"0.q": "w3a16"}), RTN()]):
        graph = qc.compile(language_model(), recipe, overrides=overrides).graph
        bits = {name: scheme.weight and scheme.weight.bits for name, scheme in graph.schemes.items()}
        assert (bits["0.down"], bits["1.down"], bits["0.q"], bits["1.q"], bits["head"]) == (8, 8, None, 4, None)


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('base = "w4a16-rtn"\n[schemes]\n"*.down" = "w8a16"\n[[passes]]\nuse = "RTN"\nsearch = "mse"')
    for recipe in (path, str(path)):
        result = qc.compile(language_model(), recipe, overrides={"0.*": "w3a16"})
        bits = {site.site: site.scheme.split()[0] for site in result.report.sites}
        assert (bits["1.q"], bits["1.down"], bits["0.down"], bits["0.q"]) == ("int4", "int8", "int3", "int3")
        assert result.manifest["recipe"][1]["options"]["search"] == "mse"


def test_overrides_need_an_assignment() -> None:
    with pytest.raises(RecipeError, match="assigns schemes"):
        qc.compile(language_model(), [_LeaveAlone()], overrides={"*": "w8a16"})


@dataclass(frozen=True)
class _LeaveAlone(Pass):
    """Takes the scheme of one site away, and says so."""

    effect: ClassVar[Effect] = Effect.ANALYSIS

    def rewrite(self, wave: Wave, statistics: Mapping[Any, Any], context: PassContext) -> PassResult:
        return PassResult(
            modified=False, skips=tuple(Skip(site.name, self.name, "too hard: name it in an override") for site in wave)
        )


def test_strict_refuses_a_skip() -> None:
    skipping = qc.compile(language_model(), [_LeaveAlone()])
    assert len(skipping.report.skipped) == 15
    assert any("no weight was quantized" in note for note in skipping.report.notes)
    with pytest.raises(RecipeError) as caught:
        qc.compile(language_model(), [_LeaveAlone()], strict=True)
    assert caught.value.got == "too hard: name it in an override"
    qc.compile(language_model(), [RTN(bits=4)], overrides={"0.q": None}, strict=True)  # asked for


def test_a_target_refuses_before_anything_is_calibrated() -> None:
    class Unread:
        def __iter__(self) -> Any:
            raise AssertionError("read")

    with pytest.raises(TargetError) as caught:
        qc.compile(chain(), [GPTQ(bits=4, group_size=1)], Unread(), targets=["onnx"])
    assert caught.value.where == "onnx: 0"


@pytest.mark.parametrize(
    ("options", "error", "got"),
    [
        ({"recipe": "w5a16"}, RecipeError, "w5a16"),
        ({"targets": ["tpu"]}, TargetError, "tpu"),
        ({"device": "abacus"}, InputError, "abacus"),
        ({"work_dir": "/proc/nowhere"}, InputError, None),
        ({"seed": 1 << 63}, InputError, str(1 << 63)),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[qc.QCompilerError], got: str | None) -> None:
    with pytest.raises(error) as caught:
        qc.compile(chain(), **{"recipe": "w8a16", **options})
    if got is not None:
        assert caught.value.got == got
    else:
        assert caught.value.where == "/proc/nowhere"


def test_temporary_files_go_with_the_result_or_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(chain(), [RTN(bits=4)], work_dir=tmp_path)
    graph = result.graph
    del result
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    graph.weights.read("0.weight_codes")  # lives as long as it is read from
    del graph
    gc.collect()
    assert not list(tmp_path.iterdir())

    def fail(graph: Graph) -> None:
        raise VerificationError("wrong")

    monkeypatch.setattr(compiling, "verify_graph", fail)
    with pytest.raises(VerificationError):
        qc.compile(chain(), [RTN(bits=4)], work_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_self_generated_windows_fit_the_model() -> None:
    graph = language_model()
    graph.provenance["config"] = {"vocab_size": 32, "max_position_embeddings": 20, "bos_token_id": 1}
    result = qc.compile(graph, [GPTQ(bits=4, group_size=8)])
    assert result.report.calibration is not None
    assert result.report.calibration["source"] == "self-generated"
    assert result.report.calibration["length"] == 20
    assert any("generated itself" in note for note in result.report.notes)
    assert result.held_out is not None
    assert result.held_out.shape == (16, 20)
    assert qc.evaluate(result).tokens == 16 * 19


def test_what_was_lowered_and_not_verified_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(native: object, written: Any, **options: object) -> None:
        assert (written.path / "model.onnx").is_file()
        assert not (tmp_path / "onnx" / "model.onnx").exists()
        raise VerificationError("computes something else")

    result = qc.compile(qc.capture(build("llama", layers=1)), [RTN(bits=4, group_size=16)])
    monkeypatch.setattr(to_target, "check_parity", refuse)
    with pytest.raises(VerificationError):
        qc.lower(result, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_wrong_lowering(tmp_path: Path) -> None:
    result = qc.compile(chain(), [RTN(bits=4)])
    for target, options in (("tpu", {}), ("onnx", {"colour": "red"}), ("onnx", {"opset": 9})):
        with pytest.raises(TargetError):
            qc.lower(result, target, tmp_path / "onnx", **options)
        assert not (tmp_path / "onnx").exists()


def test_kernels_are_a_module_in_memory(tmp_path: Path) -> None:
    result = qc.compile(language_model(), [RTN(bits=4)])
    model = qc.lower(result, "kernels", device="cpu")
    assert isinstance(model, nn.Module)
    assert model.report["parity"]["max_difference"] <= model.report["parity"]["tolerance"] < 0.2
    assert result.report.targets["kernels"] is model.report
    with pytest.raises(TargetError, match="not written anywhere"):
        qc.lower(result, "kernels", tmp_path / "kernels")
    with pytest.raises(TargetError, match="written to a directory"):
        qc.lower(result, "onnx")  # type: ignore[call-overload]
    with pytest.raises(TargetError, match="unknown option"):
        qc.lower(result, "kernels", colour="red")  # type: ignore[call-overload]
    assert not list(tmp_path.iterdir())


def test_kernels_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(language_model(), [RTN(bits=4)])

    def refuse(*arguments: object, **options: object) -> None:
        raise VerificationError("computes something else")

    monkeypatch.setattr(to_target, "check_parity", refuse)
    with pytest.raises(VerificationError):
        qc.lower(result, "kernels", device="cpu")
    assert "kernels" not in result.report.targets
    assert "parity" not in qc.lower(result, "kernels", device="cpu", verify=False).report


def test_engines(tmp_path: Path) -> None:
    result = qc.compile(language_model(), [RTN(bits=4)])
    result.save(tmp_path / "out" / "native")
    opened = qc.open_artifact(tmp_path / "out", engine="kernels", device="cpu")
    assert opened.path == tmp_path / "out" / "native"
    assert type(opened).__name__ == "KernelModel"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TargetError, match="native artifacts alone"):
        qc.open_artifact(tmp_path, engine="kernels")
    with pytest.raises(TargetError, match="unknown engine"):
        qc.open_artifact(tmp_path / "out", engine="steam")


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        qc.open_artifact(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError) as caught:
        qc.open_artifact(tmp_path)
    assert caught.value.got == "notes.txt"
    with pytest.raises(ArtifactError):
        qc.load(tmp_path)


def test_no_tokens_and_no_tokenizer() -> None:
    result = qc.compile(language_model(), [RTN(bits=4)])
    with pytest.raises(InputError, match="no text to evaluate"):
        qc.evaluate(result)
    with pytest.raises(InputError, match="tokenizer"):
        qc.generate(result, "Once")


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    result = qc.compile(language_model(), [RTN(bits=3)])
    for name in ("a", "b"):
        result.save(tmp_path / name)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")
    with pytest.raises(InputError, match="not empty"):
        result.save(tmp_path / "a")


def test_every_recipe_is_in_the_matrix() -> None:
    matrix = api.recipe_matrix()
    assert all(cells["native"] == "runs" for cells in matrix.values())
    refused = {name for name, cells in matrix.items() if cells["onnx"] not in ("fused", "runs")}
    assert refused == {"nvfp4", "mxfp4"}
    assert {matrix[name]["onnx"] for name in refused} == {"refused"}
    assert matrix["w4a16-gptq"]["kernels (CUDA)"] == matrix["w4a16-gptq"]["kernels (CPU)"] == "fused"
    assert (matrix["fp8"]["kernels (CUDA)"], matrix["fp8"]["kernels (CPU)"]) == ("fused", "runs")
    assert matrix["nvfp4"]["kernels (CUDA)"] == "runs"


def test_what_is_printed_of_a_result_is_a_line() -> None:
    result = qc.compile(language_model(), [Assign("w8a16"), RTN()], device="cpu")
    for shown in (repr(result), repr(result.graph), repr(result.report)):
        assert len(shown) < 400
        assert "\n" not in shown
    assert "Assign" in repr(result) or "assign" in repr(result)
    assert "linear layers" in repr(result)


def test_a_single_target_needs_no_list() -> None:
    with pytest.raises(TargetError, match="does not take this scheme"):
        qc.compile(build("llama"), [Assign("nvfp4"), RTN()], targets="onnx", device="cpu")
    with pytest.raises(TargetError) as caught:
        qc.compile(language_model(), "w8a16", targets="onxx", device="cpu")
    assert (caught.value.got, caught.value.remedy) == ("onxx", "did you mean onnx?")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda:99", "gpu"])
def test_devices_that_nothing_runs_on(device: str) -> None:
    with pytest.raises(InputError) as caught:
        qc.compile(language_model(), "w8a16", device=device)
    assert caught.value.got == device
