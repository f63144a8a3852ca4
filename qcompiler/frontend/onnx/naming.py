"""Names of layers for weights that an exporter has left without one."""

import re

from qcompiler.frontend.onnx.nodes import Node
from qcompiler.ir import Graph

__all__ = ["name_weights"]

_NAMELESS = re.compile(r"onnx::\w+_\d+|val_\d+|\d+|(const|initializer|constant)\w*?_?\d+")
_PRODUCTS = ("MatMul", "Gemm", "Conv")


def name_weights(graph: Graph, nodes: list[Node]) -> None:
    """Gives weights that are called by a number alone the path of the module that multiplies with them.

    Exporters note it at the node. Where nothing is said, or another weight has the name, names stay.

    Args:
        graph: canonical, its weights under the names of the file.
        nodes: of the file.
    """
    readers = {name: node for node in reversed(nodes) if node.op in _PRODUCTS for name in node.inputs[1:2]}
    for site in graph.sites():
        node = readers.get(site.weight)
        if node is None or not _NAMELESS.fullmatch(site.weight):
            continue
        name = f"{node.module}.weight"
        if not node.module or name in graph.weights:
            continue
        graph.weights.rename(site.weight, name)
        for reader in graph.fx.nodes:
            if reader.op == "get_attr" and reader.target == site.weight:
                reader.target = name
