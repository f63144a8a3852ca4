"""The scales of quantized key-value caches, which hang on modules of the model.

Source: vLLM 0.32, which takes 8-bit floats with one scale for the keys and one for the values of a layer, or of
compressed-tensors one for each of their heads (``attn_head``), and maps ``<attention>.k_scale`` and
``<attention>.k_proj.k_scale`` alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qcompiler.errors import TargetError
from qcompiler.ir import CacheFormat, Graph, QuantizedCache, nearest_sites, quantized_caches
from qcompiler.lowering.checkpoint.layers import common_parent
from qcompiler.protocol import Support

__all__ = ["CacheScale", "cache_scales", "check_cached", "supports_cache"]

_LETTERS = {"key": "k", "value": "v"}


@dataclass(frozen=True)
class CacheScale:
    """The scale of the keys, or of the values, of a layer.

    Attributes:
        letter: ``k`` or ``v``.
        stored: its name in the graph's store, float32: 0-D, or ``[1, H, 1, 1]``.
        heads: that have a scale of their own; None: one for all.
        source: the linear layer whose outputs are cached.
        attention: the module that keys and values are computed in.
        module: the same, on meta.
    """

    letter: str
    stored: str
    heads: int | None
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
        reason = "engines take from a checkpoint 8-bit floats with calibrated scales, for keys and for values"
        return Support("refused", reason, f"choose kv-fp8-static, or {otherwise}")
    if spec.per_head and layout == "modelopt":
        reason = "ModelOpt checkpoints have one scale for the keys and one for the values of a layer, not one per head"
        return Support("refused", reason, "choose kv-fp8-static, or write format=compressed-tensors")
    return Support("fused")


def check_cached(formats: Mapping[str, CacheFormat | None]) -> None:
    """Refuses caches that are not all of one format, as engines have one for all that a checkpoint says.

    Raises:
        TargetError: that names the first that differs from a quantized one.
    """
    quantized = next((spec for spec in formats.values() if spec is not None), None)
    other = next((name for name, spec in formats.items() if spec != quantized), None)
    if other is not None:
        raise TargetError(
            "some caches are quantized and others are not, or not alike, and engines have one format for all",
            where=f"checkpoint: {other}",
            got=f"{formats[other] or 'float'} beside {quantized}",
            expected="one format for all keys and values",
            remedy="quantize both keys and values of all layers, or leave the cache in float, and ask the engine for a "
            "quantized one by its options (of vLLM: --kv-cache-dtype, --kv-cache-dtype-skip-layers)",
        )


def cache_scales(graph: Graph, model: nn.Module) -> list[CacheScale]:
    """Where the scales of all quantized caches belong; none where caches are float.

    Raises:
        TargetError: where keys and values come from no module.
    """
    caches = quantized_caches(graph)
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
            heads = graph.weights.info(cache.scale).shape[1] if cache.format.per_head else None
            letter = _LETTERS[cache.part]
            found.append(CacheScale(letter, cache.scale, heads, str(source), attention, modules[attention]))
    return found


def _source(graph: Graph, cache: QuantizedCache) -> str | None:
    """The one linear layer that is met on the way back from what is cached."""
    found = nearest_sites(graph, [cache.value])
    return found.pop() if len(found) == 1 else None
