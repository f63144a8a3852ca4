"""A compiled model lowered again, on the command line and from Python, and what its saved report says of that."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import qcompiler as qc
from qcompiler import to_target
from qcompiler.errors import VerificationError
from tests.tiny_checkpoint import command, file_bytes, save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "model", layers=1)


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    """An output with a native artifact alone."""
    assert command("compile", model, "-r", "w8a16", "-o", model.parent / "out").status == 0
    return model.parent / "out"


@pytest.fixture
def out(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "out"))


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


# --- convert ---------------------------------------------------------------------------------------------------------


def test_a_target_is_added_beside_native(out: Path) -> None:
    native = file_bytes(out / "native")
    result = command("convert", out, "--to", "onnx", "-o", out, "--json").result
    assert set(result) == {"artifacts", "seconds", "peak_rss_bytes", "targets"}
    assert result["artifacts"] == {"onnx": str(out / "onnx")}
    assert result["targets"]["onnx"]["parity"]["max_difference"] < 1e-3
    assert names(out) == ["native", "onnx"]
    after = file_bytes(out / "native")
    assert {name for name in native if native[name] != after[name]} == {"report.json", "report.html"}
    entry = json.loads(after["report.json"])["targets"]["onnx"]
    assert entry["path"] == str(out / "onnx")
    assert b"onnx" in after["report.html"]
    plain = command("convert", out / "native", "--to", "onnx:opset=23", "-o", out, "--overwrite")
    assert plain.status == 0, plain.errors
    assert f"written: onnx  {out / 'onnx'}" in plain.output
    assert json.loads((out / "native" / "report.json").read_text())["targets"]["onnx"]["opset"] == 23


def test_a_target_elsewhere(out: Path, tmp_path: Path) -> None:
    assert command("convert", out, "--to", "onnx", "-o", tmp_path / "other", "--json").status == 0
    assert names(out) == ["native"]
    assert names(tmp_path / "other") == ["onnx"]
    assert json.loads((out / "native" / "report.json").read_text())["targets"]["onnx"]["path"] == str(
        tmp_path / "other" / "onnx"
    )


def test_a_converted_target_replaces_another_when_it_stands(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = ("convert", out, "--to", "onnx", "-o", out, "--json")
    assert command(*convert).status == 0
    before = file_bytes(out)
    refused = command(*convert)
    assert (refused.status, refused.error["where"]) == (2, str(out / "onnx"))

    def fail(*arguments: object, **options: object) -> None:
        raise VerificationError("what was written computes something else")

    monkeypatch.setattr(to_target, "check_parity", fail)
    failed = command(*convert, "--overwrite")
    assert failed.status == 3
    assert failed.fields["error"]["artifacts"] is None
    assert file_bytes(out) == before


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("nowhere", "--to", "onnx", "-o", "out"), "ArtifactError"),
        (("out", "--to", "onnx:opset=9", "-o", "out"), "TargetError"),
        (("out", "--to", "onnx", "-o", "out/native"), "InputError"),
        (("out", "-o", "out"), "Usage"),
    ],
)
def test_wrong_conversions(out: Path, arguments: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_bytes(out)
    monkeypatch.chdir(out.parent)
    outcome = command("convert", *arguments, "--json")
    assert (outcome.status, outcome.error["type"]) == (2, kind)
    assert file_bytes(out) == before


def test_kernels_are_tried_and_nothing_is_written(out: Path) -> None:
    there = names(out)
    outcome = command("convert", out, "--to", "kernels", "-o", out, "--json")
    assert outcome.status == 0
    assert outcome.result["artifacts"] == {}
    assert outcome.result["targets"]["kernels"]["parity"]["max_difference"] >= 0
    assert names(out) == there


def test_a_scheme_the_target_refuses(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("compile", model, "-r", "mxfp4", "-o", out, "--json").status == 0
    outcome = command("convert", out, "--to", "onnx", "-o", out, "--json")
    assert outcome.error["what"] == "the target does not take this scheme"
    assert names(out) == ["native"]


# --- the report ------------------------------------------------------------------------------------------------------


def test_lowering_behind_saving_is_in_the_saved_report(compiled: Path, tmp_path: Path) -> None:
    result = qc.load(compiled)
    result.save(tmp_path / "native")
    for target, place in (("onnx", tmp_path / "onnx"), ("kernels", None)):
        page = (tmp_path / "native" / "report.html").read_bytes()
        if place is None:
            qc.lower(result, target, device="cpu", verify=False)  # type: ignore[call-overload]
        else:
            qc.lower(result, target, place, verify=False)
        saved = json.loads((tmp_path / "native" / "report.json").read_text())
        assert saved == result.report.to_dict()
        assert target in saved["targets"]
        assert (tmp_path / "native" / "report.html").read_bytes() != page
    assert names(tmp_path / "native") == names(compiled / "native")


def test_lowering_a_directory_is_in_its_report(out: Path, tmp_path: Path) -> None:
    qc.lower(out, "onnx", tmp_path / "onnx", verify=False)
    assert "onnx" in json.loads((out / "native" / "report.json").read_text())["targets"]
    assert "onnx" in qc.load(out).report.targets


def test_opening_writes_nothing(out: Path) -> None:
    before = file_bytes(out)
    qc.open_artifact(out, engine="kernels", device="cpu")
    assert file_bytes(out) == before


def test_the_report_of_another_artifact_stays(compiled: Path, out: Path, tmp_path: Path) -> None:
    result = qc.load(out)
    manifest = json.loads((out / "native" / "manifest.json").read_text())
    (out / "native" / "manifest.json").write_text(json.dumps({**manifest, "seed": 1}))
    before = file_bytes(out)
    qc.lower(result, "onnx", tmp_path / "onnx", verify=False)
    assert file_bytes(out) == before
    result.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    qc.lower(result, "onnx", tmp_path / "again", verify=False)
    assert not (tmp_path / "saved").exists()


def test_a_report_that_cannot_be_written_loses_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, make = qc.load(out), os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "report.json" in str(path):
            raise OSError(30, "Read-only file system")
        return make(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    written = qc.lower(result, "onnx", tmp_path / "onnx", verify=False)
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert any("Read-only file system" in note for note in written["notes"])
