"""Where a scale or a rotation may go into weights without changing the function, proved on the graph.

| | found by | folded into weights by |
|---|---|---|
| a scale for each channel of a `Region` | `regions`, which follows channels (`channel_walk`) | `fold_scales` |
| a rotation of a residual stream | `streams` | `fold_rotations` |
| a rotation of every head of values | `heads`, which follows channels too | `fold_rotations` |

What is found is only said; the graph changes when a scale is folded or a rotation put in. Refusals carry their reason.
"""

from qcompiler.proofs.fold_rotations import (
    Rotation,
    rotate_heads,
    rotate_input,
    rotate_stream,
)
from qcompiler.proofs.fold_scales import (
    consumer_scale,
    fold_scale,
    input_factors,
    per_channel,
)
from qcompiler.proofs.heads import find_heads
from qcompiler.proofs.region import Consumer, Region, Regions
from qcompiler.proofs.regions import find_regions
from qcompiler.proofs.streams import Refused, find_streams, online_inputs

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
    "fold_scale",
    "input_factors",
    "online_inputs",
    "per_channel",
    "rotate_heads",
    "rotate_input",
    "rotate_stream",
]
