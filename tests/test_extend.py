"""The door for guests: what the pages and the examples of guests import comes from there alone."""

import ast
import re
from pathlib import Path

import pytest

from qcompiler import extend, passes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / name for name in ("writing-a-pass.md", "rewriting-the-graph.md")]
DOORS = {"qcompiler", "qcompiler.extend", "qcompiler.passes"}


def programs() -> dict[str, str]:
    """The Python of every page and example that is about code of one's own."""
    found = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("custom_*.py")}
    for page in PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found[page.name] = "\n".join(blocks)
    return found


@pytest.mark.parametrize("name", programs())
def test_guests_need_no_other_door(name: str) -> None:
    imports = [node for node in ast.walk(ast.parse(programs()[name])) if isinstance(node, ast.ImportFrom)]
    ours = {node.module or "" for node in imports if (node.module or "").partition(".")[0] == "qcompiler"}
    assert "qcompiler.extend" in ours
    assert ours <= DOORS


def test_what_is_promised_is_there() -> None:
    assert sorted(set(extend.__all__), key=str) == sorted(extend.__all__, key=str)
    for name in extend.__all__:
        assert hasattr(extend, name)
    described = re.findall(r"`(\w+)`", extend.__doc__ or "")
    assert described
    for name in described:
        assert name in extend.__all__ or hasattr(passes, name), name
