"""``make matrix``: writes the table of recipes and targets into README.md, as `qcompiler recipes` prints it."""

from collections.abc import Mapping
from pathlib import Path

from qcompiler.api import recipe_matrix

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- matrix, written by `make matrix` -->\n", "<!-- end of matrix -->\n"


def table(matrix: Mapping[str, Mapping[str, str]]) -> str:
    """The matrix in Markdown."""
    targets = list(next(iter(matrix.values())))
    rows = [["recipe", *targets], ["---"] * (len(targets) + 1)]
    rows += [[f"`{name}`", *(cells[target] for target in targets)] for name, cells in matrix.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def updated(text: str) -> str:
    """The text with the table between its two markers made anew.

    Raises:
        ValueError: if it does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs each of these lines once: {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(recipe_matrix()) + END + after


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
