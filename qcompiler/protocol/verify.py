"""`verify_graph`: proves that a rewritten graph is legal, by what stands in it alone; nothing is run.

Whether it still computes what it should is asked elsewhere: `declarations` holds a pass to what it says of itself, and
`qcompiler.artifacts.parity` compares a lowered model with the graph.
"""

import operator

import torch
from torch import fx

from qcompiler.errors import VerificationError
from qcompiler.ir import (
    Graph,
    Site,
    is_op,
    is_quantized_weight,
    quantized_value,
    stored_names,
)
from qcompiler.numerics import QuantSpec, Scheme, fp4

__all__ = ["verify_graph"]

_fp4_dequantize = torch.ops.qcompiler.fp4_dequantize.default
_fp4_scale = torch.ops.qcompiler.fp4_scale.default
_codebook_dequantize = torch.ops.qcompiler.codebook_dequantize.default
_sparse_add = torch.ops.qcompiler.sparse_add.default
_choose_qparams = torch.ops.qcompiler.choose_qparams.default


def verify_graph(graph: Graph) -> None:
    """Proves that a rewritten graph is legal.

    The graph is well-formed and has its signature's ports; every stored tensor it names exists; every site is quantized
    or not as its scheme says, weight and activation, in the scheme's dtypes, shapes and grouping, with positive and
    finite scales.

    Raises:
        VerificationError: naming the tensor or node that is not.
    """
    _verify_structure(graph)
    for site in graph.sites():
        _verify_activation(graph, site, graph.schemes.get(site.name, Scheme()).activation)
        spec = graph.schemes.get(site.name, Scheme()).weight
        for weight in dict.fromkeys(node.args[1] for node in site.nodes):
            assert isinstance(weight, fx.Node)
            is_quantized = is_quantized_weight(weight)
            if (spec is not None) != is_quantized:
                raise VerificationError(
                    "a site was not given what its scheme says",
                    where=site.name,
                    got="a quantized weight" if is_quantized else "a float weight",
                    expected=spec or "a float weight",
                    remedy="add a weight quantizer to the recipe, such as GPTQ(), or SqueezeLLM() for codebooks",
                )
            if spec is not None:
                problems = _weight_problems(graph, site, spec, weight)
                if problems:
                    raise VerificationError("an illegal quantized weight", where=site.name, got="; ".join(problems))


def _is_positive(graph: Graph, name: str) -> bool:
    values = graph.weights.read(name, check_finite=False)
    return bool(((values > 0) & values.isfinite()).all())


def _verify_activation(graph: Graph, site: Site, spec: QuantSpec | None) -> None:
    for value in site.inputs:
        is_quantized = quantized_value(value) is not None
        if (spec is not None) != is_quantized:
            raise VerificationError(
                "the input of a site was not given what its scheme says",
                where=site.name,
                got="a quantized activation" if is_quantized else "a float activation",
                expected=spec or "a float activation",
                remedy="add InsertQDQ() to the recipe",
            )
        if spec is not None:
            problems = _activation_problems(graph, site, spec, value)
            if problems:
                raise VerificationError("an illegal quantized activation", where=site.name, got="; ".join(problems))


def _activation_problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """What is wrong with a quantized activation, against its scheme."""
    if is_op(node, _fp4_dequantize) is not spec.is_fp4:
        return ["4-bit floats where the scheme has other codes, or the other way round"]
    if spec.is_fp4:
        return _fp4_activation_problems(graph, site, spec, node)
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    value, scale, zero, axis, block, dtype = codes.args[:6]
    problems = []
    if codes.args[6:] != spec.narrow_bits():
        problems.append(f"codes are not of {spec.bits} bits")
    if dtype != spec.code_dtype:
        problems.append(f"codes are {dtype}, not {spec.code_dtype}")
    if node.args[1:5] != codes.args[1:5]:
        problems.append("it is not dequantized with the scale it was quantized with")
    place = spec.input_place(site.in_features)
    if (axis, block) != place:
        problems.append(f"scales run along (axis, block) {(axis, block)}, not {place}")
    if (zero is None) is not spec.symmetric:
        problems.append("a zero point where the scheme is symmetric, or none where it is not")
    for index, qparam in ((0, scale), (1, zero)):
        if not isinstance(qparam, fx.Node):
            continue
        chosen = qparam.args[0] if is_op(qparam, operator.getitem) and qparam.args[1] == index else None
        if is_op(chosen, _choose_qparams) is not spec.dynamic:
            problems.append("a range that is static where the scheme is dynamic, or the other way round")
        elif isinstance(chosen, fx.Node):
            if chosen.args != (value, *spec.range_options(site.in_features)):
                problems.append("a range of something else")
        elif graph.weights.info(str(qparam.target)).shape != ():
            problems.append(f"{qparam.target} is not one number")
        elif index == 0 and not _is_positive(graph, str(qparam.target)):
            problems.append("scales are not all positive and finite")
        elif index == 1 and graph.weights.info(str(qparam.target)).dtype != spec.stored_dtype:
            problems.append(f"zero point is not {spec.stored_dtype}")
    return problems


def _fp4_activation_problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """The same for 4-bit floats: the scale of every block has to be computed from the value itself."""
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    value, scale, factor, block = codes.args
    problems = []
    if node.args[1:] != codes.args[1:]:
        problems.append("it is not dequantized with the scale it was quantized with")
    if block != spec.group_of(site.in_features):
        problems.append(f"blocks of {block}, not {spec.group_of(site.in_features)}")
    if not isinstance(scale, fx.Node) or not is_op(scale, _fp4_scale):
        problems.append("scales of blocks that are not computed from the value")
    elif scale.args != (value, factor, block, spec.exponent == "floor"):
        problems.append("scales of something else")
    return problems + _factor_problems(graph, spec, factor)


def _factor_problems(graph: Graph, spec: QuantSpec, factor: object) -> list[str]:
    """What is wrong with the factor of a tensor in NVFP4, or with there being one elsewhere."""
    if (factor is not None) is not spec.has_factor:
        return ["no factor where scales are relative to one, or one where they are not"]
    if not isinstance(factor, fx.Node):
        return []
    info = graph.weights.info(str(factor.target))
    if (info.dtype, info.shape) != ("float32", ()):
        return [f"factor is {info.dtype} {info.shape}, not one float32 number"]
    return [] if _is_positive(graph, info.name) else ["the factor is not positive and finite"]


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


def _weight_problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """What is wrong with a quantized weight, against its scheme."""
    if is_op(node, _codebook_dequantize, _sparse_add) is not spec.codebook:
        return ["a codebook where the scheme has scales, or the other way round"]
    if spec.codebook:
        return _codebook_problems(graph, site, spec, node)
    if is_op(node, _fp4_dequantize) is not spec.is_fp4:
        return ["4-bit floats where the scheme has other codes, or the other way round"]
    if spec.is_fp4:
        return _fp4_problems(graph, site, spec, node)
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
    elif spec.granularity == "per_block":
        side = spec.group_size or 0
        shape, place = (-(-rows // side), -(-columns // side)), (1, side)
    else:
        shape, place = ((rows,) if spec.granularity == "per_channel" else ()), (0, 0)
    code_dtype = spec.stored_dtype
    problems = []
    if codes.dtype != code_dtype:
        problems.append(f"codes are {codes.dtype}, not {code_dtype}")
    if codes.shape != (rows, columns):
        problems.append(f"codes have shape {codes.shape}, not {(rows, columns)}")
    if scale.shape != shape:
        problems.append(f"scale has shape {scale.shape}, not {shape}")
    if node.args[3:5] != place:
        problems.append(f"scales run along (axis, block) {node.args[3:5]}, not {place}")
    if not _is_positive(graph, scale.name):
        problems.append("scales are not all positive and finite")
    if (zero is None) is not spec.symmetric:
        problems.append("a zero point where the scheme is symmetric, or none where it is not")
    elif zero is not None and (zero.dtype, zero.shape) != (code_dtype, shape):
        problems.append(f"zero point is {zero.dtype} {zero.shape}, not {code_dtype} {shape}")
    return problems


def _fp4_problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """What is wrong with 4-bit floats and the scales of their blocks."""
    sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
    codes, scale = (graph.weights.info(str(source.target)) for source in sources)
    rows, columns = site.out_features, site.in_features
    group = spec.group_of(columns)
    scale_dtype = "float8_e4m3fn" if spec.has_factor else "uint8"
    problems = []
    for part, info, dtype, shape in (
        ("codes", codes, spec.stored_dtype, (rows, columns)),
        ("scale", scale, scale_dtype, (rows, -(-columns // group))),
    ):
        if (info.dtype, info.shape) != (dtype, shape):
            problems.append(f"{part}: {info.dtype} {info.shape}, not {dtype} {shape}")
    if node.args[3] != group:
        problems.append(f"blocks of {node.args[3]}, not {group}")
    stored = graph.weights.read(scale.name, check_finite=False)
    if not bool((fp4.decode_scale(stored, None) > 0).all()):  # a NaN is not
        problems.append("scales are not all positive and finite")
    return problems + _factor_problems(graph, spec, node.args[2])


def _codebook_problems(graph: Graph, site: Site, spec: QuantSpec, node: fx.Node) -> list[str]:
    """What is wrong with tables and the codes that are places in them, and with what is added."""
    store, problems = graph.weights, []
    codes, table, *sparse = (store.info(name) for name in stored_names(node))
    rows, columns = site.out_features, site.in_features
    if (codes.dtype, codes.shape) != (spec.stored_dtype, (rows, columns)):
        problems.append(f"codes are {codes.dtype} {codes.shape}, not {spec.stored_dtype} {(rows, columns)}")
    if table.shape != (rows, 1 << spec.bits):
        problems.append(f"table has shape {table.shape}, not {(rows, 1 << spec.bits)}")
    if not store.read(table.name, check_finite=False).isfinite().all():
        problems.append("table is not finite")
    if sparse:
        values, places, offsets = (store.read(info.name, check_finite=False) for info in sparse)
        if not values.isfinite().all():
            problems.append("a value of the sparse matrix is not finite")
        if offsets.shape != (rows + 1,) or places.shape != values.shape or values.dim() != 1:
            problems.append("the parts of the sparse matrix do not belong together")
        elif int(offsets[0]) or int(offsets[-1]) != len(values) or bool((offsets.diff() < 0).any()):
            problems.append("rows of the sparse matrix do not follow one another")
        elif bool(((places < 0) | (places >= columns)).any()):
            problems.append("a value of the sparse matrix lies outside of the weight")
    return problems
