"""Checks on what passes made: every quantized weight is legal, and the graph holds together."""

import torch
from torch import fx

from qcompiler.errors import VerificationError
from qcompiler.graph import Graph, Site, is_op
from qcompiler.spec import QuantSpec, Scheme

__all__ = ["verify_graph"]

_dequantize = torch.ops.qcompiler.dequantize.default


def verify_graph(graph: Graph) -> None:
    """Proves that a rewritten graph is legal.

    The graph is well-formed and has its signature's ports; every stored tensor it names exists; every site is quantized
    or not as its scheme says, in the scheme's dtypes, shapes and grouping, with positive and finite scales.

    Raises:
        VerificationError: naming the tensor or node that is not.
    """
    _verify_structure(graph)
    for site in graph.sites():
        spec = graph.schemes.get(site.name, Scheme()).weight
        for weight in dict.fromkeys(node.args[1] for node in site.nodes):
            assert isinstance(weight, fx.Node)
            is_quantized = is_op(weight, _dequantize)
            if (spec is not None) != is_quantized:
                raise VerificationError(
                    "a site was not given what its scheme says",
                    where=site.name,
                    got="a quantized weight" if is_quantized else "a float weight",
                    expected=spec or "a float weight",
                    remedy="add a weight quantizer such as RTN() or GPTQ() to the recipe",
                )
            if spec is not None:
                problems = _problems(graph, site, spec, weight)
                if problems:
                    raise VerificationError("an illegal quantized weight", where=site.name, got="; ".join(problems))


def _verify_structure(graph: Graph) -> None:
    try:
        graph.fx.lint()
        found = len(graph.inputs), len(graph.outputs)
    except (RuntimeError, AssertionError, TypeError, IndexError) as error:
        raise VerificationError("the graph is not well-formed", got=error) from error
    expected = len(graph.signature.inputs), len(graph.signature.outputs)
    if found != expected:
        raise VerificationError(
            "the graph does not have its signature's ports",
            got=f"{found[0]} inputs and {found[1]} outputs",
            expected=f"{expected[0]} and {expected[1]}",
        )
    for name in graph.weight_names():
        if name not in graph.weights:
            raise VerificationError("the graph names a tensor that is not stored", where=name)


def _problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """What is wrong with a quantized weight, against its scheme."""
    sources = node.args[:3]
    codes, scale, zero = (
        graph.weights.info(str(source.target)) if isinstance(source, fx.Node) else None for source in sources
    )
    if codes is None or scale is None:
        return ["no codes or no scale"]
    rows, columns = site.out_features, site.in_features
    shape: tuple[int, ...]
    if spec.granularity == "per_group":
        shape, place = (rows, -(-columns // spec.group_of(columns))), (1, spec.group_of(columns))
    else:
        shape, place = ((rows,) if spec.granularity == "per_channel" else ()), (0, 0)
    code_dtype = f"{'int' if spec.symmetric else 'uint'}{spec.bits}"
    problems = []
    if codes.dtype != code_dtype:
        problems.append(f"codes are {codes.dtype}, not {code_dtype}")
    if codes.shape != (rows, columns):
        problems.append(f"codes have shape {codes.shape}, not {(rows, columns)}")
    if scale.shape != shape:
        problems.append(f"scale has shape {scale.shape}, not {shape}")
    if node.args[3:5] != place:
        problems.append(f"scales run along (axis, block) {node.args[3:5]}, not {place}")
    values = graph.weights.read(scale.name, check_finite=False)
    if not bool(((values > 0) & values.isfinite()).all()):
        problems.append("scales are not all positive and finite")
    if (zero is None) is not spec.symmetric:
        problems.append("a zero point where the scheme is symmetric, or none where it is not")
    elif zero is not None and (zero.dtype, zero.shape) != (code_dtype, shape):
        problems.append(f"zero point is {zero.dtype} {zero.shape}, not {code_dtype} {shape}")
    return problems
