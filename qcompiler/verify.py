"""Checks on what passes made: every quantized weight is legal, and the graph holds together."""

import torch
from torch import fx

from qcompiler.errors import VerificationError
from qcompiler.graph import Graph, is_op

__all__ = ["verify_graph"]

_dequantize = torch.ops.qcompiler.dequantize.default


def verify_graph(graph: Graph) -> None:
    """Proves that a rewritten graph is legal.

    The graph is well-formed; every stored tensor it names exists; codes lie in the range of their scheme; scales are
    positive and finite and have the shape their granularity asks for.

    Raises:
        VerificationError: naming the tensor or node that is not.
    """
    try:
        graph.fx.lint()
    except RuntimeError as error:
        raise VerificationError("the graph is not well-formed", got=error) from error
    for name in graph.weight_names():
        if name not in graph.weights:
            raise VerificationError("the graph names a tensor that is not stored", where=name)
    for site in graph.sites():
        scheme = graph.schemes.get(site.name)
        weight = site.nodes[0].args[1]
        is_quantized = is_op(weight, _dequantize)
        if scheme is not None and (scheme.weight is not None) != is_quantized:
            raise VerificationError(
                "a site was not given what its scheme says",
                where=site.name,
                got="a quantized weight" if is_quantized else "a float weight",
                expected=scheme.weight or "a float weight",
                remedy="add a weight quantizer such as RTN() or GPTQ() to the recipe",
            )
        if is_quantized and scheme is not None and scheme.weight is not None:
            assert isinstance(weight, fx.Node)
            _verify_weight(graph, site.name, weight)


def _verify_weight(graph: Graph, site: str, node: fx.Node) -> None:
    spec = graph.schemes[site].weight
    assert spec is not None
    names = [str(source.target) for source in node.args[:3] if isinstance(source, fx.Node)]
    codes, scale = graph.weights.info(names[0]), graph.weights.read(names[1])
    expected = f"{'int' if spec.symmetric else 'uint'}{spec.bits}"
    rows, columns = codes.shape
    shapes = {
        "per_group": (rows, -(-columns // spec.group_of(columns))),
        "per_channel": (rows,),
        "per_tensor": (),
    }
    problems = []
    if codes.dtype != expected:
        problems.append(f"codes are {codes.dtype}, not {expected}")
    if tuple(scale.shape) != shapes[spec.granularity]:
        problems.append(f"scale has shape {tuple(scale.shape)}, not {shapes[spec.granularity]}")
    if not bool((scale > 0).all()):
        problems.append("scales are not all positive")
    if (len(names) == 3) is spec.symmetric:
        problems.append("a zero point where the scheme is symmetric, or none where it is not")
    if problems:
        raise VerificationError("an illegal quantized weight", where=site, got="; ".join(problems))
