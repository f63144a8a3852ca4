"""A rewrite of the graph of your own, proved exact by the compiler; docs/rewriting-the-graph.md explains it.

``qcompiler compile MODEL --recipe examples/custom_rewrite.py:RECIPE --to onnx -o OUT``
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import fx

from qcompiler.extend import (
    CANONICAL,
    FLOAT_ACTIVATIONS,
    FLOAT_WEIGHTS,
    Effect,
    Graph,
    Pass,
    PassContext,
    PassResult,
    Skip,
    numerics,
)
from qcompiler.passes import RTN, Assign

hadamard = torch.ops.qcompiler.hadamard


@dataclass(frozen=True)
class RotateInputs(Pass):
    """``linear(x, W)`` becomes ``linear(x H, W H)``: H is orthogonal, so the product is what it was.

    Attributes:
        pattern: which layers, by name.
    """

    pattern: str = "*.down_proj"

    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({CANONICAL, FLOAT_WEIGHTS, FLOAT_ACTIVATIONS})

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rotates weights when they are read, and each value once for all chosen layers that read it."""
        readers, skips = dict[fx.Node, list[fx.Node]](), []
        for site in [site for site in graph.sites() if fnmatchcase(site.name, self.pattern)]:
            block = numerics.block_order(site.in_features)
            if block == 1:
                skips.append(Skip(site.name, self.name, f"no Hadamard matrix for {site.in_features} channels"))
                continue
            graph.derive_float(site.weight, lambda weight, block=block: hadamard(weight.float(), block))
            for value in site.inputs:
                readers.setdefault(value, []).extend(node for node in site.nodes if node.args[0] is value)
        for value, nodes in readers.items():
            graph.insert(hadamard.default, value, nodes, numerics.block_order(nodes[0].meta["weight_shape"][1]))
        return PassResult(modified=bool(readers), skips=tuple(skips))


RECIPE = (RotateInputs(), Assign("w4a16"), RTN())
