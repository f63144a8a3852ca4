"""Where channels may be scaled, and where a stream may be turned, proved on the graph.

In: a graph. Out: regions (`find_regions`), rotations, and the rewriting of weights that folds one in; refusals carry
their reason.
"""

from qcompiler.proofs.folding import (
    consumer_scale,
    fold,
    input_factors,
    per_channel,
)
from qcompiler.proofs.heads import find_heads
from qcompiler.proofs.region import Consumer, Region, Regions
from qcompiler.proofs.regions import find_regions
from qcompiler.proofs.rotating import (
    Rotation,
    rotate_heads,
    rotate_input,
    rotate_stream,
)
from qcompiler.proofs.rotation import Refused, find_streams, online_inputs

__all__ = [
    "Consumer",
    "Refused",
    "Region",
    "Regions",
    "Rotation",
    "consumer_scale",
    "find_heads",
    "find_regions",
    "find_streams",
    "fold",
    "input_factors",
    "online_inputs",
    "per_channel",
    "rotate_heads",
    "rotate_input",
    "rotate_stream",
]
