"""The named recipes: each a tuple of passes, nothing more."""

from collections.abc import Callable

from qcompiler.errors import RecipeError, did_you_mean
from qcompiler.passes.assign import Assign
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.insert_qdq import InsertQDQ
from qcompiler.passes.quantize_embedding import QuantizeEmbedding
from qcompiler.passes.quantize_kv_cache import QuantizeKVCache
from qcompiler.passes.rotate import Rotate
from qcompiler.passes.rtn import RTN
from qcompiler.passes.smooth_quant import SmoothQuant
from qcompiler.passes.squeezellm import SqueezeLLM
from qcompiler.protocol import ACTIVATIONS_QUANTIZED, CACHE_QUANTIZED, WEIGHTS_QUANTIZED, Pass

__all__ = ["CACHES", "EMBEDDINGS", "RECIPES", "recipe"]

_W4A4 = "w4a4-actasym-clip90"

RECIPES: dict[str, Callable[[], tuple[Pass, ...]]] = {
    "w8a16": lambda: (Assign("w8a16"), RTN()),
    "w4a16-rtn": lambda: (Assign("w4a16"), RTN()),
    "w4a16-gptq": lambda: (Assign("w4a16"), GPTQ()),
    "w3a16-gptq": lambda: (Assign("w3a16"), GPTQ()),
    "w4a16-awq": lambda: (Assign("w4a16"), AWQ(), RTN(search="gram")),
    "w4a16-awq-gptq": lambda: (Assign("w4a16"), AWQ(), GPTQ()),
    "w3a16-squeezellm": lambda: (Assign("w3a16-lut"), SqueezeLLM()),
    "w4a16-squeezellm": lambda: (Assign("w4a16-lut"), SqueezeLLM()),
    "w8a8-smoothquant": lambda: (Assign("w8a8"), SmoothQuant(), InsertQDQ(), GPTQ(correction=0)),
    "w8a8-rtn": lambda: (Assign("w8a8"), RTN(), InsertQDQ()),
    "w8a8-dynamic": lambda: (Assign("w8a8-dynamic"), RTN(), InsertQDQ(observer=None)),
    "w4a8": lambda: (Assign("w4a8-dynamic"), InsertQDQ(), GPTQ()),
    "w4a4-gptq": lambda: (Assign(_W4A4), InsertQDQ(), GPTQ(correction=0.25)),
    "w4a4-rotated": lambda: (
        Assign(_W4A4),
        Rotate(online_heads=True),
        InsertQDQ(),
        GPTQ(correction=0.25),
    ),
    "fp8": lambda: (Assign("fp8"), InsertQDQ(observer="minmax"), GPTQ()),
    "fp8-dynamic": lambda: (Assign("fp8-dynamic"), RTN(search="mse"), InsertQDQ(observer=None)),
    "fp8-block": lambda: (Assign("fp8-block-dyngroup"), RTN(search="mse"), InsertQDQ(observer=None)),
    "nvfp4": lambda: (Assign("nvfp4"), InsertQDQ(observer="minmax"), GPTQ()),
    "mxfp4": lambda: (Assign("mxfp4"), InsertQDQ(), GPTQ()),
}
"""Name → maker of the passes."""


CACHES: dict[str, Callable[[], QuantizeKVCache]] = {
    "kv-fp8": lambda: QuantizeKVCache("fp8"),
    "kv-int8": lambda: QuantizeKVCache("int8"),
    "kv-int4": lambda: QuantizeKVCache("int4", rotate=True),
    "kv-int8-static": lambda: QuantizeKVCache("int8", scales="static"),
    "kv-int4-static": lambda: QuantizeKVCache("int4", scales="static", symmetric=True),
    "kv-fp8-static": lambda: QuantizeKVCache("fp8", scales="static"),
    "kv-fp8-static-head": lambda: QuantizeKVCache("fp8", scales="static", per_head=True),
}
"""What stands behind the ``+`` of a name, or alone: the cache, besides weights and activations or without."""
EMBEDDINGS: dict[str, Callable[[], QuantizeEmbedding]] = {
    "emb-int8": lambda: QuantizeEmbedding(8),
    "emb-int4": lambda: QuantizeEmbedding(4, search="mse"),
}
"""What stands there, too: the embedding table."""


def recipe(name: str) -> tuple[Pass, ...]:
    """The passes of a named recipe, such as ``w4a16-gptq``, ``w4a16-gptq+kv-int8+emb-int8`` or ``kv-int8``.

    Raises:
        RecipeError: for an unknown name, or two caches or embeddings.
    """
    more: dict[str, Callable[[], Pass]] = {**CACHES, **EMBEDDINGS}
    base, *added = name.split("+")
    if base in more:
        added = [base, *added]
    kinds = [item in EMBEDDINGS for item in added]
    unknown = next((item for item in added if item not in more), None if base in {**RECIPES, **more} else base)
    if unknown is not None or len(set(kinds)) < len(kinds):
        names = (*RECIPES, *more) if unknown == base else tuple(more)
        raise RecipeError(
            "unknown recipe",
            got=name,
            expected=f"{', '.join(RECIPES)}; each with +{', +'.join(more)} (one cache, one embedding), or those alone",
            remedy=did_you_mean(unknown or name, names)
            or "or give FILE.toml, FILE.py:NAME, or a list of passes in Python",
        )
    passes: tuple[Pass, ...] = RECIPES[base]() if base in RECIPES else ()
    for item in sorted(added, key=lambda item: item in CACHES):
        passes = _with(passes, more[item]())
    return passes


def _with(passes: tuple[Pass, ...], added: Pass) -> tuple[Pass, ...]:
    """Ahead of what rounds weights and activations, which is then calibrated on it, and behind what only rescales."""
    facts = {WEIGHTS_QUANTIZED, ACTIVATIONS_QUANTIZED, CACHE_QUANTIZED}
    place = next((i for i, item in enumerate(passes) if facts & item.establishes), len(passes))
    return (*passes[:place], added, *passes[place:])
