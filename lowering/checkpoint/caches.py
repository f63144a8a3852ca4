"""The scales of quantized key-value caches, which hang on modules of the model.

Source: vLLM 0.32, which takes 8-bit floats with one scale for the keys and one for the values of a layer, and maps
``<attention>.k_scale`` and ``<attention>.k_proj.k_scale`` alike.
"""

from dataclasses import dataclass

from torch import nn

from qcompiler.errors import TargetError
from qcompiler.ir import FLOAT_CACHES, CacheFormat, Graph, QuantizedCache, nearest_sites, quantized_caches
from qcompiler.lowering.checkpoint.layers import common_parent
from qcompiler.protocol import Support

__all__ = ["CacheScale", "cache_scales", "supports_cache"]

_LETTERS = {"key": "k", "value": "v"}


@dataclass(frozen=True)
class CacheScale:
    """The scale of the keys, or of the values, of a layer.

    Attributes:
        letter: ``k`` or ``v``.
        stored: its name in the graph's store, 0-D float32.
        source: the linear layer whose outputs are cached.
        attention: the module that keys and values are computed in.
        module: the same, on meta.
    """

    letter: str
    stored: str
    source: str
    attention: str
    module: nn.Module


def supports_cache(spec: CacheFormat, layout: str) -> Support:
    """What becomes of a cache of some format in a layout."""
    otherwise = "leave the cache in float here, and ask the engine for a quantized one by its options"
    if layout not in ("compressed-tensors", "modelopt"):
        remedy = f"write format=compressed-tensors, or {otherwise}"
        return Support("refused", f"{layout} checkpoints have no place for the scales of a cache", remedy)
    if not spec.is_float or spec.scales != "static":
        reason = "engines take from a checkpoint 8-bit floats with one calibrated scale for keys and one for values"
        return Support("refused", reason, f"choose kv-fp8-static, or {otherwise}")
    return Support("fused")


def cache_scales(graph: Graph, model: nn.Module) -> list[CacheScale]:
    """Where the scales of all quantized caches belong; none where caches are float.

    Raises:
        TargetError: where one cache is quantized and another is not, or keys and values come from no module.
    """
    caches = quantized_caches(graph)
    left = [port for port in graph.signature.outputs if port.role == "present" and port.dtype in FLOAT_CACHES]
    if caches and left:
        raise TargetError(
            "some caches are quantized and others are not, and engines have one format for all",
            where=f"checkpoint: {left[0].name}",
            got=f"{left[0].dtype} beside {caches[0].format}",
            expected="one format for all keys and values",
            remedy="quantize both keys and values, or leave the cache in float",
        )
    modules = dict(model.named_modules())
    of_layer: dict[int, list[QuantizedCache]] = {}
    for cache in caches:
        of_layer.setdefault(cache.layer, []).append(cache)
    found = []
    for layer, pair in of_layer.items():
        sources = [_source(graph, cache) for cache in pair]
        attention = common_parent([source for source in sources if source])
        if None in sources or attention not in modules:
            raise TargetError(
                "the layers that keys and values come from are not found, or have no module in common",
                where=f"checkpoint: cache {layer}",
                got=", ".join(str(source) for source in sources),
                expected="linear layers of one attention module",
                remedy="leave the cache in float",
            )
        for cache, source in zip(pair, sources, strict=True):
            assert cache.scale is not None
            found.append(CacheScale(_LETTERS[cache.part], cache.scale, str(source), attention, modules[attention]))
    return found


def _source(graph: Graph, cache: QuantizedCache) -> str | None:
    """The one linear layer that is met on the way back from what is cached."""
    found = nearest_sites(graph, [cache.value])
    return found.pop() if len(found) == 1 else None
