"""Passes: one file, one pass. `recipes` names tuples of them."""

from qcompiler.passes.assign import Assign
from qcompiler.passes.awq import AWQ
from qcompiler.passes.fisher import Fisher
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.quantize_embedding import QuantizeEmbedding
from qcompiler.passes.quantize_kv_cache import QuantizeKVCache
from qcompiler.passes.recipes import RECIPES, recipe
from qcompiler.passes.rotate import Rotate
from qcompiler.passes.rtn import RTN
from qcompiler.passes.smooth_quant import SmoothQuant
from qcompiler.passes.squeezellm import SqueezeLLM

__all__ = [
    "AWQ",
    "GPTQ",
    "RECIPES",
    "RTN",
    "Assign",
    "Fisher",
    "InsertQDQ",
    "QuantizeEmbedding",
    "QuantizeKVCache",
    "Rotate",
    "SmoothQuant",
    "SqueezeLLM",
    "recipe",
]
