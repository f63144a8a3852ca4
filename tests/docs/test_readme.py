"""README.md is up to date; what it and the tutorial tell a reader to paste works."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from docs.update_matrix import BEGIN, END, README, table, updated
from qcompiler.passes.recipes import RECIPES
from tests.docs.pasted import blocks, run_here
from tests.tiny_checkpoint import command, save_checkpoint


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


# --- Quick start ------------------------------------------------------------------------------------------------------

ROOT = README.parent


def program(page: str) -> list[tuple[str, str]]:
    """What a reader pastes, in order."""
    if page == "tutorial":
        return blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), "python", "bash")
    return blocks(quick_start(), "python", "bash")


def quick_start() -> str:
    return README.read_text(encoding="utf-8").split("\n## Quick start\n")[1].split("\n## ")[0]


@pytest.fixture
def beside_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory but for the examples, the current one."""
    (tmp_path / "examples").mkdir()
    for path in (ROOT / "examples").iterdir():
        (tmp_path / "examples" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("Quick start", {"compile", "evaluate", "generate", "inspect", "recipes"}),
        ("tutorial", {"compile", "convert", "evaluate", "generate", "inspect", "recipes", "recommend", "targets"}),
    ],
)
def test_pages_work_word_for_word_on_a_tiny_model(page: str, commands: set[str], beside_examples: Path) -> None:
    shipped = beside_examples / "examples" / "booklm"
    shipped.unlink()
    model = save_checkpoint(shipped, layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    names: dict[str, object] = {}
    ran = [name for block in program(page) for name in run_here(*block, names)]
    assert set(ran) == commands
    assert sorted(path.name for path in beside_examples.iterdir()) == ["examples", "out"]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["Quick start", "tutorial"])
def test_pages_work_as_they_are_pasted(page: str, beside_examples: Path) -> None:
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    programs = f'python() {{ "{sys.executable}" "$@"; }}; qcompiler() {{ python -m qcompiler "$@"; }}; set -e\n'
    for language, content in program(page):
        pasted = [sys.executable, "-c", content] if language == "python" else ["bash", "-c", programs + content]
        subprocess.run(pasted, check=True, env={**os.environ, **paths})
    assert sorted(path.name for path in beside_examples.iterdir()) == ["examples", "out"]
    out = {"Quick start": "out/python", "tutorial": "out/hand-on"}[page]
    divergence = command("evaluate", out, "--against", "examples/booklm", "--json").result["kl_divergence"]
    assert 0 < divergence < 0.02


def test_quick_start_installs_what_it_uses() -> None:
    (install,) = (content for _, content in blocks(quick_start(), "") if "pip" in content)
    assert shlex.split(install.splitlines()[-1]) == ["pip", "install", "-e", ".[onnx]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {Requirement(line).name for line in project["optional-dependencies"]["onnx"]}
    assert {"onnx", "onnxruntime"} <= extra

    ranges = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    (newest,) = (item.version for item in ranges["torch"] if item.operator == "<")
    assert f"CPU build of torch below {newest}," in " ".join(README.read_text(encoding="utf-8").split())
    # Each minor version of transformers renames something: none is let in that was not tested.
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (tested,) = (Version(line.partition("==")[2]) for line in pins if line.startswith("transformers=="))
    assert tested in ranges["transformers"]
    assert f"{tested.major}.{tested.minor + 1}" not in ranges["transformers"]
