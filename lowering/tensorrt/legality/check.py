"""Holds an ONNX file to the rules of TensorRT's parser and builder, without either."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.errors import TargetError
from qcompiler.lowering.tensorrt.legality.attention_rules import ATTENTION_RULES, is_attention, is_quantized_attention
from qcompiler.lowering.tensorrt.legality.model import read_model
from qcompiler.lowering.tensorrt.legality.operands import Product, product_of
from qcompiler.lowering.tensorrt.legality.operator_rules import OPERATOR_RULES
from qcompiler.lowering.tensorrt.legality.product_rules import PRODUCT_RULES
from qcompiler.lowering.tensorrt.legality.quantizer_rules import QUANTIZER_RULES
from qcompiler.lowering.tensorrt.legality.rule import Rule, Verdict
from qcompiler.lowering.tensorrt.legality.value_rules import VALUE_RULES

__all__ = ["CAPABILITIES", "RULES", "Checked", "Finding", "check", "check_model"]

CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that tensorrt_rtx 1.7 builds for."""

NODE_RULES: tuple[Rule[ir.Node], ...] = (*OPERATOR_RULES, *ATTENTION_RULES, *QUANTIZER_RULES, *PRODUCT_RULES)
RULES: tuple[Rule[ir.Node] | Rule[ir.Value], ...] = (*NODE_RULES, *VALUE_RULES)
_WORST: tuple[Verdict, ...] = ("refused", "wrong", "unfused")


@dataclass(frozen=True)
class Finding:
    """What a rule says of a model.

    Attributes:
        node: the first node (or constant, input, output) that it says this of.
        rule: its name.
        verdict: see `qcompiler.lowering.tensorrt.legality.Verdict`.
        found: what it found there.
        reason, remedy: of the rule.
        count: how many places it says the same of.
        sm: the compute capabilities for which it holds.
    """

    node: str
    rule: str
    verdict: Verdict
    found: str
    reason: str
    remedy: str
    count: int
    sm: tuple[int, ...]


@dataclass(frozen=True)
class Checked:
    """What the rules say of a model.

    Attributes:
        findings: the worst first.
        fused: of products with quantized weights and attentions that no finding is about, how many there are of each
            kind, such as ``{"INT4 weights": 56}``.
        builds: whether nothing is refused or wrong.
    """

    findings: tuple[Finding, ...]
    fused: dict[str, int]

    @property
    def builds(self) -> bool:
        """Whether nothing is refused or wrong."""
        return all(finding.verdict == "unfused" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        findings = [asdict(finding) for finding in self.findings]
        return {"builds": self.builds, "findings": findings, "fused": self.fused}


def check_model(source: str | Path | ir.Model, sm: Sequence[int] = (89,)) -> list[Finding]:
    """What TensorRT refuses, computes differently or does not fuse in a model, the worst first; see `check`."""
    return list(check(source, sm).findings)


def check(source: str | Path | ir.Model, sm: Sequence[int] = (89,)) -> Checked:
    """Holds a model to the rules. Neither TensorRT nor the weights are needed.

    Args:
        source: an ONNX file, or a model in memory.
        sm: compute capabilities, such as 89 for 8.9.

    Raises:
        InputError: for what is no legal ONNX file, see `read_model`.
        TargetError: for an unknown compute capability.
    """
    _check_capabilities(sm)
    model = read_model(source)
    found: dict[tuple[str, str], _Group] = {}
    touched: set[str] = set()
    for capability in sm:
        for name, rule, text in _apply(model, capability):
            found.setdefault((rule.name, text), _Group(rule, text)).add(name, capability)
            touched.add(name)
    findings = [group.finding() for group in found.values()]
    findings.sort(key=lambda finding: (_WORST.index(finding.verdict), -finding.count))
    fused = Counter(kind for names, kind in _parts(model) if touched.isdisjoint(names))
    return Checked(tuple(findings), dict(fused))


class _Group:
    """Places of which a rule says the same."""

    def __init__(self, rule: Rule[ir.Node] | Rule[ir.Value], text: str) -> None:
        self._rule, self._text = rule, text
        self._names: dict[str, None] = {}
        self._sm: dict[int, None] = {}

    def add(self, name: str, sm: int) -> None:
        self._names[name] = None
        self._sm[sm] = None

    def finding(self) -> Finding:
        rule = self._rule
        first, count = next(iter(self._names)), len(self._names)
        return Finding(first, rule.name, rule.verdict, self._text, rule.reason, rule.remedy, count, tuple(self._sm))


def _check_capabilities(sm: Sequence[int]) -> None:
    unknown = [capability for capability in sm if capability not in CAPABILITIES]
    if unknown or not sm:
        raise TargetError(
            "an unknown compute capability" if unknown else "no compute capability",
            got=", ".join(map(str, unknown)) or None,
            expected=f"of {', '.join(map(str, CAPABILITIES))}",
        )


def _apply(model: ir.Model, sm: int) -> Iterator[tuple[str, Rule[ir.Node] | Rule[ir.Value], str]]:
    for value in _values(model):
        for value_rule in VALUE_RULES:
            text = value_rule.condition(value, sm)
            if text is not None:
                yield value.name or "?", value_rule, text
    for node in model.graph.all_nodes():
        for rule in NODE_RULES:
            text = rule.condition(node, sm)
            if text is not None:
                yield called(node), rule, text


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Of all graphs: inputs, constants, and what nodes make."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from (value for value in graph.initializers.values() if value not in graph.inputs)
    for node in model.graph.all_nodes():
        yield from (value for value in node.outputs if value.name)


def _parts(model: ir.Model) -> Iterable[tuple[set[str], str]]:
    """What ought to be fused: the nodes and constants that it consists of, and its kind."""
    for node in model.graph.all_nodes():
        product = product_of(node)
        if product is not None and product.weight.codes is not None:
            rounded = product.activation
            by = "" if rounded is None or rounded.codes is None else f" by {rounded.codes.name} activations"
            yield {called(node), *_names(product)}, f"{product.weight.codes.name} weights{by}"
        elif is_attention(node):
            yield {called(node)}, "attention"
        elif is_quantized_attention(node):
            yield {called(node)}, "FP8 attention"


def _names(product: Product) -> Iterator[str]:
    for side in (product.weight, product.activation):
        if side is not None:
            for value in side.dequantize.inputs[:1]:
                maker = None if value is None else value.producer()
                yield (value.name if value is not None else None) or "?"
                if maker is not None:
                    yield called(maker)
            yield from (called(node) for node in (side.dequantize, *side.path))


def called(node: ir.Node) -> str:
    """The name of a node, or what it makes."""
    return node.name or f"{node.op_type} of {node.outputs[0].name if node.outputs else 'nothing'}"
