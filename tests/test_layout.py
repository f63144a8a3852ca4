"""The rooms of the repository: who may import whom, what is packaged, and that every file has its tests."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE, PASSES, LOWERING = ROOT / "qcompiler", ROOT / "passes", ROOT / "lowering"
ROOMS = [
    "cli",
    "api",
    "advice",
    "to_target",
    "extend",
    "testing",
    "advisor",
    "sweep",
    "artifacts",
    "reporting",
    "protocol",
    "proofs",
    "frontend",
    "ir",
    "storage",
    "numerics",
    "errors",
]
"""Of the core, top first: imports run downwards."""
COMPOSITION_ROOT = tuple(CORE / f"{name}.py" for name in ("api", "advice", "to_target"))
COMPOSITION_ROOT += tuple((CORE / "cli").glob("*.py"))
OPTIONAL = ("matplotlib", "ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "rich", "scipy", "tensorrt", "triton", "typer")


def sources(room: Path) -> list[Path]:
    """Python files of one room, without what the core reaches through its links to the other two."""
    return sorted(path for path in room.rglob("*.py") if path.resolve() == path)


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, anywhere in it, with their lines."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] in ("passes", "lowering"):
        package = ("qcompiler", *package)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            if node.module:
                base.append(node.module)
            for alias in node.names:
                yield ".".join([*base, alias.name]), node.lineno


def offences(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    """Imports of the forbidden packages, as ``file:line imports name``."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imported_names(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in forbidden)
    ]


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter that runs ``code`` at the root of the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_rooms_are_relative_links():
    for name in ("passes", "lowering"):
        link = CORE / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_core_imports_no_room():
    files = [p for p in sources(CORE) if p not in COMPOSITION_ROOT]
    assert len(files) > 5
    assert offences(files, ("qcompiler.passes", "qcompiler.lowering", "passes", "lowering")) == []


def room_of(name: str) -> str | None:
    """The room that a dotted name lies in; None outside the core."""
    first, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return room if first == "qcompiler" and room in ROOMS else None


def upward(files: list[Path]) -> list[str]:
    """Imports of the core that run up."""
    found = []
    for path in files:
        here = path.relative_to(CORE).parts[0].removesuffix(".py")
        for name, line in imported_names(path):
            there = room_of(name)
            if there is not None and here in ROOMS and ROOMS.index(there) < ROOMS.index(here):
                found.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {name}")
    return found


def test_imports_of_the_core_run_downwards():
    files = sources(CORE)
    assert {path.relative_to(CORE).parts[0].removesuffix(".py") for path in files} == {*ROOMS, "__init__", "__main__"}
    assert upward(files) == []


def test_an_import_that_runs_up_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "CORE", tmp_path / "qcompiler")
    (tmp_path / "qcompiler" / "ir").mkdir(parents=True)
    file = tmp_path / "qcompiler" / "ir" / "graph.py"
    file.write_text("from qcompiler.errors import InputError\nfrom qcompiler.sweep import position\n")
    assert upward([file]) == ["qcompiler/ir/graph.py:2: ir imports qcompiler.sweep.position"]


def behind(files: list[Path]) -> list[str]:
    """Imports that reach behind the face of another room."""
    found = []
    for path in files:
        here = path.relative_to(ROOT).parts[1] if path.is_relative_to(CORE) else None
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            room = room_of(node.module)
            if room is not None and node.module.count(".") > 1 and room != here:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} imports from {node.module}")
    return found


def test_nobody_reaches_behind_a_room():
    assert behind(sources(CORE) + sources(PASSES) + sources(LOWERING) + sorted((ROOT / "examples").glob("*.py"))) == []


def test_files_are_short_and_folders_are_small():
    files = [*sources(CORE), *sources(PASSES), *sources(LOWERING)]
    files += [path for name in ("benchmarks", "tests", "examples") for path in (ROOT / name).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 400] == []
    folders = Counter(path.parent for path in files)
    assert [f"{folder.relative_to(ROOT)}: {count}" for folder, count in folders.items() if count > 15] == []


def test_passes_do_not_import_lowering():
    assert offences(sources(PASSES), ("qcompiler.lowering", "lowering", "passes")) == []


def test_lowering_does_not_import_passes():
    assert offences(sources(LOWERING), ("qcompiler.passes", "passes", "lowering")) == []


def test_rooms_do_not_import_the_composition_root():
    files = sources(PASSES) + sources(LOWERING)
    assert offences(files, ("qcompiler.api", "qcompiler.cli")) == []


def test_offences_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    room = tmp_path / "passes"
    room.mkdir()
    for i, line in enumerate(
        (
            "import qcompiler.lowering.onnx",
            "from qcompiler import lowering",
            "from qcompiler.lowering import onnx",
            "def f():\n    from ..lowering import onnx",
        )
    ):
        (room / f"p{i}.py").write_text(line + "\n")
    (room / "fine.py").write_text("from qcompiler import graph\nfrom . import gptq\n")
    found = offences(sorted(room.glob("*.py")), ("qcompiler.lowering",))
    assert [text.split(":")[0] for text in found] == [f"passes/p{i}.py" for i in range(4)]


def test_each_module_has_one_identity():
    loaded = run_python(
        "import sys, qcompiler, qcompiler.passes, qcompiler.lowering\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('passes', 'lowering')])"
    )
    assert loaded.strip() == "[]"


def test_import_is_light():
    loaded = run_python(f"import sys, qcompiler\nprint([m for m in {OPTIONAL!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


@pytest.mark.parametrize("path", [p for p in sources(PASSES) if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_each_pass_has_a_test_file(path):
    place = ROOT / "tests" / path.relative_to(ROOT)
    assert place.with_name(f"test_{path.name.lstrip('_')}").is_file()


def test_wheel_holds_every_source(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for room in (CORE, PASSES, LOWERING):
        shutil.copytree(room, tree / room.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("qcompiler-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = {str(p.relative_to(ROOT)) for p in sources(CORE)}
    expected |= {f"qcompiler/{p.relative_to(ROOT)}" for p in sources(PASSES) + sources(LOWERING)}
    assert packed == expected
    data = {str(path.relative_to(ROOT)) for path in (CORE / "advisor").glob("*.toml")} | {"qcompiler/py.typed"}
    assert data <= set(zipfile.ZipFile(wheel).namelist())
