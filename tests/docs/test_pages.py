"""The documentation: its examples run, and what it links to is there."""

import importlib
import re
from pathlib import Path

import pytest

from qcompiler import extend
from qcompiler.ir.graph import Graph
from qcompiler.lowering.tensorrt.legality import RULES
from qcompiler.numerics import spec
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes.recipe_file import load_recipe, read_recipe
from qcompiler.protocol.pass_base import Pass, PassContext
from qcompiler.protocol.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_can_be_read(page: Path) -> None:
    """Tables, links and pictures aside, a line has at most 120 characters."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    assert [f"{number}: {line}" for number, line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


SCHEMES = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "docs" / "schemes.md").read_text("utf-8"), re.MULTILINE)


def test_there_are_examples_of_schemes() -> None:
    assert len(SCHEMES) >= 10


@pytest.mark.parametrize(("name", "words"), SCHEMES)
def test_examples_of_schemes_are_right(name: str, words: str) -> None:
    assert str(Scheme.parse(name)) == words


def test_every_option_of_a_scheme_is_on_its_page() -> None:
    page = (ROOT / "docs" / "schemes.md").read_text(encoding="utf-8")
    for option in (*spec.KIND, "lut", "clip90", "g64", "floor", "ceil"):
        assert f"`-{option}`" in page, option


TOML = [(page, text) for page in PAGES for text in blocks(page, "toml")]


def test_there_are_recipes() -> None:
    assert len(TOML) >= 3


@pytest.mark.parametrize("text", [text for _, text in TOML], ids=[page.name for page, _ in TOML])
def test_recipes_are_legal(text: str, tmp_path: Path) -> None:
    text = text.replace("../examples/", f"{ROOT}/examples/")
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    assert len(Pipeline(read_recipe(tmp_path / "recipe.toml")).passes) >= 2


def test_the_pass_on_the_page_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(ROOT / "docs" / "writing-a-pass.md", "python")), encoding="utf-8")
    (imported, *_) = load_recipe(f"{program}:RECIPE")
    assert imported.name == "assign"
    assert "relative squared error" in capsys.readouterr().out


def test_the_rewrites_on_the_page_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "rewrites.py"
    program.write_text("\n".join(blocks(ROOT / "docs" / "rewriting-the-graph.md", "python")), encoding="utf-8")
    (imported,) = load_recipe(f"{program}:FuseSwish")
    assert imported.name == "fuse-swish"
    assert "refused: a pass that is declared exact changed" in capsys.readouterr().out


def test_every_rule_of_tensorrt_is_on_its_page() -> None:
    page = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (refused|wrong|unfused) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(rule.name, rule.verdict, rule.reason) for rule in RULES]


def test_every_fact_and_method_on_the_page_is_there() -> None:
    page = (ROOT / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    for name in ("requires", "establishes", "invalidates", "barrier", "rewrites_upstream", "waves", "statistics"):
        assert hasattr(Pass, name)
        assert f"`{name}" in page
    for name in re.findall(r"`context\.(\w+)", page):
        assert name in {*PassContext.__dataclass_fields__, *vars(PassContext)}, name
    for name in re.findall(r"`(?:context\.)?graph\.(\w+)", page):
        assert name in {*Graph.__dataclass_fields__, *vars(Graph)}, name
    for name in re.findall(r"`(Gram|CrossGram|AbsMax|MinMax|Histogram)`", page):
        assert hasattr(extend, name)


def resolves(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_every_name_that_is_referred_to_is_there() -> None:
    rooms = [path for name in ("qcompiler", "passes", "lowering", "examples") for path in (ROOT / name).rglob("*.py")]
    named: dict[str, Path] = {}
    for path in (*PAGES, *rooms):
        for name in re.findall(r"`(qcompiler(?:\.\w+)+)`", path.read_text(encoding="utf-8")):
            named.setdefault(name, path)
    assert len(named) > 30
    assert [f"{path.relative_to(ROOT)}: {name}" for name, path in named.items() if not resolves(name)] == []
