"""The benchmark of the kernels as a command, and that it needs little to run."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import __main__ as command
from benchmarks.kernels.sections import SECTIONS
from tests.made_up_worker import made_up_driver

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so(capsys):
    assert command.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "no CUDA device" in said.err
    assert "--device cpu" in said.err


def test_a_check_that_does_not_hold_fails_the_command_but_not_the_table(tmp_path, monkeypatch, capsys):
    driver = made_up_driver(tmp_path, "held('a', section != 'check-cache'); say(done=True)")
    monkeypatch.setattr(command, "worker_command", lambda device, *options: driver.worker)
    sections = ["check-rows", "check-cache", "attention"]
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--only", *sections]
    assert command.main(arguments) == 1
    found = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert [record["section"] for record in found["records"]].count("attention") == 1
    assert found["failed"] is True
    assert "does not hold" in (tmp_path / "kernels_cpu.md").read_text()
    assert "Checks: 2 of 3 hold." in capsys.readouterr().out
    assert command.main([*arguments[:-2], "attention"]) == 0


def _modules_needed(*names):
    """Top-level modules of distributions and of all that they require."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.split(r"[^A-Za-z0-9._-]", waiting.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [line for line in required if "extra ==" not in line]
    by_module = importlib.metadata.packages_distributions()
    return {m for m, dists in by_module.items() if any(d.lower().replace("_", "-") in found for d in dists)}


NEVER = {"click", "hypothesis", "jinja2", "ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "pytest", "rich", "typer"}
SITE = """
import sys
from importlib.machinery import PathFinder

class OnBareMachine:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ALLOWED or top.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)

ALLOWED = {allowed!r}
sys.meta_path = [OnBareMachine if finder is PathFinder else finder for finder in sys.meta_path]
"""


def _bare_environment(tmp_path):
    """An environment in which processes can import what the command may need, and nothing else."""
    allowed = _modules_needed("numpy", "safetensors", "torch", "transformers", "triton") - NEVER
    allowed |= {"benchmarks", "qcompiler", "sitecustomize", "usercustomize"}
    (tmp_path / "sitecustomize.py").write_text(SITE.replace("{allowed!r}", repr(sorted(allowed))))
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}


def _bare(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=_bare_environment(tmp_path), capture_output=True, text=True
    )


def test_a_bare_machine_refuses_what_it_does_not_have(tmp_path):
    for name in ("pytest", "rich", "scipy"):
        assert f"No module named '{name}'" in _bare(tmp_path, "-c", f"import {name}").stderr


def test_the_package_can_be_imported_on_a_bare_machine(tmp_path):
    found = _bare(tmp_path, "-c", "import qcompiler, qcompiler.lowering.kernels, torch; print(len(qcompiler.__all__))")
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 5


def _runs_bare(tmp_path, sections):
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *sections]
    found = _bare(tmp_path, "-m", "benchmarks.kernels", *options)
    assert found.returncode == 0, found.stdout + found.stderr
    records = json.loads((tmp_path / "kernels_cpu.json").read_text())["records"]
    assert {record["section"] for record in records} == set(sections)
    assert all(record["passed"] for record in records if record["kind"] == "Verdict")
    assert not [record for record in records if record["kind"] == "LeftOut" and "time" in record["reason"]]


def test_the_command_runs_on_a_bare_machine(tmp_path):
    _runs_bare(tmp_path, ["attention"])


@pytest.mark.slow
def test_all_of_the_command_runs_on_a_bare_machine(tmp_path):
    _runs_bare(tmp_path, [section.name for section in SECTIONS if section.mode != "background"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_target_of_make_needs_nothing_built():
    # Under `make test`, make would take over the flags of that one, and name directories on standard output.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "gpu", f"PYTHON={sys.executable}", "BIN=/nowhere"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert found.returncode == 2
    assert "no CUDA device" in found.stderr
    assert found.stdout == ""
