"""Which layer of an engine each linear layer and each attention went to, and whether it is fused there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qcompiler.lowering.tensorrt.engine.layers import Layer, Tensor

__all__ = ["Placement", "fused_attentions", "fused_linears"]

_PRODUCTS = ("gemm", "runtime_fusion")
_DISTANCE = 4


@dataclass(frozen=True)
class Placement:
    """Where something of the graph is in the engine, under one profile.

    Attributes:
        name: the site, or the attention.
        profile: index.
        layer: the engine's layer; None if none says it was made of it.
        kind: of that layer.
        constants: the types of its weights and scales, in order, each once.
        inputs: the types of what it multiplies them with, or of queries, keys and values.
        fused: whether a linear layer multiplies quantized weights, or an attention is one kernel.
        reason: why it is not; empty where it is.
        together_with: what else went to the same layer.
    """

    name: str
    profile: int
    layer: str | None
    kind: str | None
    constants: tuple[str, ...]
    inputs: tuple[str, ...]
    fused: bool
    reason: str
    together_with: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields."""
        return asdict(self)


def fused_linears(
    layers: Sequence[Layer], nodes: Mapping[str, str], *, weights: Mapping[str, int] | None = None
) -> dict[str, tuple[Placement, ...]]:
    """What became of linear layers: fused where a layer made of their MatMul multiplies quantized constants.

    A layer of the engine may be made of several, such as q, k and v.

    Args:
        layers: of the engine, all profiles.
        nodes: by site, the name of its MatMul node in the ONNX file.
        weights: by site, how many weights it has. Where given, the constants of a layer must be as many as those of
            the sites that it was made of.

    Returns:
        By site, one for each profile in order.
    """
    found: dict[str, list[Placement]] = {site: [] for site in nodes}
    for profile, own in _by_profile(layers):
        made_of = {layer.name: [site for site, node in nodes.items() if node in layer.origins] for layer in own}
        homes: dict[str, Layer] = {}
        for site, node in nodes.items():
            candidates = [layer for layer in own if node in layer.origins]
            if candidates:
                homes[site] = min(candidates, key=lambda layer: _rank(layer, len(made_of[layer.name])))
        for site in nodes:
            home = homes.get(site)
            others = tuple(o for o, layer in homes.items() if layer is home and o != site) if home else ()
            reason = _unfused(home, site, others, own, weights or {})
            found[site].append(_placed(site, profile, home, reason, others))
    return {site: tuple(placements) for site, placements in found.items()}


def fused_attentions(
    layers: Sequence[Layer], nodes: Mapping[str, Sequence[str]], *, in_float8: bool = False
) -> dict[str, tuple[Placement, ...]]:
    """What became of attentions: fused where one kernel for attention was made of their nodes.

    Those kernels have ``mha`` in their names: ``_gemm_mha_v2`` for many queries, ``_gemv_mha_v1`` for one.

    Args:
        layers: of the engine, all profiles.
        nodes: by attention, the names of its nodes in the ONNX file: one ``Attention``, or the products it is written
            out in.
        in_float8: whether it is to read FP8 codes.

    Returns:
        By attention, one for each profile in order.
    """
    found: dict[str, list[Placement]] = {name: [] for name in nodes}
    for profile, own in _by_profile(layers):
        for name, names in nodes.items():
            made = [layer for layer in own if not set(layer.origins).isdisjoint(names)]
            fused = [layer for layer in made if "mha" in layer.name.lower()]
            products = [layer for layer in made if layer.kind == "gemm" or "gemm" in layer.name.lower()]
            if fused:
                types = dict.fromkeys(tensor.dtype for tensor in fused[0].inputs)
                reason = f"a kernel that reads {_types(fused[0].inputs)}" if in_float8 and "FP8" not in types else ""
                found[name].append(_placed(name, profile, fused[0], reason, ()))
                continue
            reason = f"decomposed into {len(products)} products of matrices in {len(made)} layers"
            home = next(iter((*products, *made)), None)
            if home is None:
                reason = "no layer of the engine names it"
            found[name].append(_placed(name, profile, home, reason, ()))
    return {name: tuple(placements) for name, placements in found.items()}


def _by_profile(layers: Iterable[Layer]) -> list[tuple[int, list[Layer]]]:
    found: dict[int, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.profile, []).append(layer)
    return sorted(found.items())


def _rank(layer: Layer, sites: int) -> tuple[bool, bool, int]:
    """Least for the layer that multiplies: what dequantizes, an epilogue or a neighbour may name the node as well."""
    return not _multiplies(layer), layer.kind not in _PRODUCTS, sites


def _multiplies(layer: Layer) -> bool:
    """Whether a layer multiplies quantized weights, and does not make float ones of them for another.

    What does has no inputs. (Seen where the weights of several products are put together: it names those products.) Or
    it is generated with something else, and one of its outputs is as large as its codes.
    """
    if not layer.quantized or not layer.inputs:
        return False
    least = min(math.prod(constant.shape) for constant in layer.quantized)
    return layer.kind in _PRODUCTS or all(_size(tensor) < least for tensor in layer.outputs)


def _size(tensor: Tensor) -> int:
    """Elements; 0 where a size varies."""
    return 0 if -1 in tensor.shape else math.prod(tensor.shape)


def _placed(name: str, profile: int, home: Layer | None, reason: str, others: tuple[str, ...]) -> Placement:
    if home is None:
        return Placement(name, profile, None, None, (), (), False, reason)
    constants = tuple(dict.fromkeys(constant.dtype for constant in home.constants))
    inputs = tuple(dict.fromkeys(tensor.dtype for tensor in home.inputs))
    return Placement(name, profile, home.name, home.kind, constants, inputs, not reason, reason, others)


def _unfused(
    home: Layer | None, site: str, others: Sequence[str], layers: Sequence[Layer], weights: Mapping[str, int]
) -> str:
    """Why a linear layer is not fused; empty where it is."""
    if home is None:
        return "no layer of the engine names it"
    if not _multiplies(home):
        source = home if home.quantized else _dequantizer(home, layers)
        if source is None:
            return f"multiplied with {_types(home.constants) or _types(home.inputs)}"
        return f"dequantized from {_types(source.quantized)} to {_types(source.outputs)} by a kernel of its own"
    known = [weights[name] for name in (site, *others) if name in weights]
    there = sum(math.prod(constant.shape) for constant in home.quantized)
    if sum(known) > there:
        return f"the layer that names it has {there} quantized weights, of {sum(known)} that it would need"
    return ""


def _types(tensors: Iterable[Tensor]) -> str:
    return " and ".join(dict.fromkeys(tensor.dtype for tensor in tensors if math.prod(tensor.shape) != 1))


def _dequantizer(layer: Layer, layers: Sequence[Layer]) -> Layer | None:
    """The layer that makes float weights of codes for this one, a few layers up."""
    makers = {tensor.name: maker for maker in layers for tensor in maker.outputs}
    near = [layer]
    for _ in range(_DISTANCE):
        near = [makers[tensor.name] for one in near for tensor in one.inputs if tensor.name in makers]
        for maker in near:
            if maker.quantized and not maker.inputs:
                return maker
    return None
