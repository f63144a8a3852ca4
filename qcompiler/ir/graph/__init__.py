"""`Graph`, and what is done to one; a file for each.

| file | holds |
|---|---|
| `graph.py` | `Graph`: nodes, ports, weights by name |
| `nodes.py` | what a node is: a call of some operator, a quantized weight, a rounded activation |
| `sites.py` | `Site`, a linear layer, and how to find them all |
| `insertion.py` | an operator put between a value and what reads it |
| `shapes.py` | the dtype and the symbolic shape that an operator gives |
| `floats.py` | float tensors rewritten, and the dtypes they had |
| `quantizing.py` | weights and activations replaced by their quantized forms |
| `graph_json.py` | a graph as JSON |
"""

from qcompiler.ir.graph.graph import Graph
from qcompiler.ir.graph.nodes import activation_rounding, is_op, is_quantized_weight, quantized_value, stored_names
from qcompiler.ir.graph.shapes import symbolic_size
from qcompiler.ir.graph.sites import Site, site_name

__all__ = [
    "Graph",
    "Site",
    "activation_rounding",
    "is_op",
    "is_quantized_weight",
    "quantized_value",
    "site_name",
    "stored_names",
    "symbolic_size",
]
