"""The named recipes: each a tuple of passes, nothing more."""

from collections.abc import Callable

from qcompiler.errors import RecipeError
from qcompiler.pass_base import Pass
from qcompiler.passes.assign import Assign
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.rtn import RTN
from qcompiler.passes.smooth_quant import SmoothQuant

__all__ = ["RECIPES", "recipe"]

RECIPES: dict[str, Callable[[], tuple[Pass, ...]]] = {
    "w8a16": lambda: (Assign("w8a16"), RTN()),
    "w4a16-rtn": lambda: (Assign("w4a16"), RTN()),
    "w4a16-gptq": lambda: (Assign("w4a16"), GPTQ()),
    "w3a16-gptq": lambda: (Assign("w3a16"), GPTQ()),
    "w4a16-awq": lambda: (Assign("w4a16"), AWQ(), RTN(search="gram")),
    "w4a16-awq-gptq": lambda: (Assign("w4a16"), AWQ(), GPTQ()),
    "w8a8-smoothquant": lambda: (Assign("w8a8"), SmoothQuant(), InsertQDQ(), GPTQ(correction=0)),
    "w8a8-rtn": lambda: (Assign("w8a8"), RTN(), InsertQDQ()),
    "w8a8-dynamic": lambda: (Assign("w8a8-dynamic"), RTN(), InsertQDQ(observer=None)),
    "fp8": lambda: (Assign("fp8"), InsertQDQ(observer="minmax"), GPTQ()),
    "nvfp4": lambda: (Assign("nvfp4"), InsertQDQ(observer="minmax"), GPTQ()),
    "mxfp4": lambda: (Assign("mxfp4"), InsertQDQ(observer=None), GPTQ()),
    "fp8-dynamic": lambda: (Assign("fp8-dynamic"), RTN(search="mse"), InsertQDQ(observer=None)),
}
"""Name → maker of the passes."""


def recipe(name: str) -> tuple[Pass, ...]:
    """The passes of a named recipe.

    Raises:
        RecipeError: for an unknown name.
    """
    if name not in RECIPES:
        raise RecipeError(
            "unknown recipe",
            got=name,
            expected=", ".join(RECIPES),
            remedy="or give FILE.toml, FILE.py:NAME, or a list of passes in Python",
        )
    return RECIPES[name]()
