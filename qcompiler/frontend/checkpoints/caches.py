"""Scales of keys and values: what a checkpoint says of the cache becomes the graph's cache.

``k_scale`` and ``v_scale`` lie beside the layers of an attention (compressed-tensors) or beside the very layer that
makes keys or values (ModelOpt), one number each or (``attn_head`` of compressed-tensors) one for each head: what is
cached is ``float8_e4m3fn(key / k_scale)``.

Source: the layouts of both, and the loader of scales in vLLM.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qcompiler.errors import WeightError
from qcompiler.frontend.checkpoints.contents import CHECK_SETTINGS, FLOATS, Checkpoint
from qcompiler.ir import Cache, CacheFormat, Graph, float_caches, quantize_cache

__all__ = ["place_caches", "take_cache_scales"]

_PARTS = {"k_scale": "key", "v_scale": "value"}
_SCALES = {part: name for name, part in _PARTS.items()}
_FORMAT = CacheFormat("float8_e4m3fn", "static")


def take_cache_scales(checkpoint: Checkpoint, *, is_fp8: bool, said: object) -> None:
    """Takes the scales of keys and values, and says what is lost of them.

    Args:
        checkpoint: whose ``cache_scales`` are filled.
        is_fp8: whether the settings say that caches are 8-bit floats, each with a stored scale.
        said: what they say; None where they say nothing of the cache.

    Raises:
        WeightError: for a scale that is not positive.
    """
    found: list[str] = []
    for module in checkpoint.modules(*_PARTS):
        for part in _PARTS:
            if checkpoint.has(module, part):
                found.append(checkpoint.take(module, part, FLOATS))
                scale = checkpoint.stored.read(found[-1]).float()
                if not bool((scale > 0).all()):
                    raise WeightError(
                        "a scale is not positive", where=found[-1], got=float(scale.min()), remedy=CHECK_SETTINGS
                    )
                if is_fp8:
                    checkpoint.cache_scales[module, _PARTS[part]] = scale
    if said is not None and not is_fp8:
        checkpoint.lost[f"the cache stays in float: no operator keeps it as {said}"] = []
    elif said is not None and not found:
        checkpoint.lost["the cache stays in float: it is to be float8, but no scales are stored (engines take 1)"] = []
    elif said is None and found:
        lost = "scales of a cache that the settings do not speak of are left out"
        checkpoint.lost[lost] = list(dict.fromkeys(name.rpartition(".")[0] for name in found))


def place_caches(graph: Graph, checkpoint: Checkpoint, stored: Mapping[str, str]) -> None:
    """Makes the caches that the checkpoint has scales of caches of 8-bit floats, in place.

    Args:
        graph: canonical, with float caches.
        checkpoint: as read.
        stored: for the name of each site, the path of its layer in the checkpoint.

    Raises:
        WeightError: for scales that are neither one nor one for each head.
    """
    placed = set[tuple[str, str]]()
    for cache in float_caches(graph) if checkpoint.cache_scales else ():
        makers = [stored[name] for name in _makers(graph, cache) if name in stored]
        key = next((key for key in checkpoint.cache_scales if key[1] == cache.part and _holds(key[0], makers)), None)
        if key is None:
            lost = "caches stay in float that no scale is stored of, though others are"
            checkpoint.lost.setdefault(lost, []).append(cache.name)
            continue
        placed.add(key)
        scale = checkpoint.cache_scales[key]
        if scale.numel() not in (1, cache.heads):
            raise WeightError(
                "the scales of a cache are neither one nor one for each head",
                where=f"{key[0]}.{_SCALES[key[1]]}",
                got=tuple(scale.shape),
                expected=f"1 or {cache.heads} numbers",
                remedy=CHECK_SETTINGS,
            )
        is_one = scale.numel() == 1
        graph.weights.set(f"{cache.name}_scale", scale.reshape(() if is_one else (1, cache.heads, 1, 1)))
        quantize_cache(graph, cache, replace(_FORMAT, per_head=not is_one), f"{cache.name}_scale")
    rest = [f"{module} ({part}s)" for module, part in checkpoint.cache_scales if (module, part) not in placed]
    if rest:
        checkpoint.lost["scales of caches that the graph does not have are left out"] = rest


def _holds(module: str, makers: list[str]) -> bool:
    return bool(makers) and all(maker == module or maker.startswith(f"{module}.") for maker in makers)


def _makers(graph: Graph, cache: Cache) -> Iterator[str]:
    """The names of the linear layers met first on the way back from what is cached."""
    site_of = {node: site.name for site in graph.sites() for node in site.nodes}
    stack, seen = [cache.new], {cache.new}
    while stack:
        node = stack.pop()
        if node in site_of:
            yield site_of[node]
            continue
        fresh = set(node.all_input_nodes) - seen
        seen |= fresh
        stack.extend(fresh)
