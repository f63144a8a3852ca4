"""What to do with a model on a GPU: recipes in order, with the numbers and the reasons.

In: sizes of a model (`read_shape`, `told_shape`), hardware (`find_hardware`, `measure_machine`), recipes as far as
their formats go (`Candidate`) and targets (`Offer`), both handed in. Out: `Advice`. `footprint` counts bytes,
`roofline` bounds times, `quality` knows what formats are expected to cost, `ranking` has the rules.
"""

from qcompiler.advisor.footprint import cache_bytes, cache_bytes_per_token, weight_bytes, weight_parts
from qcompiler.advisor.hardware import Hardware, find_hardware, known_hardware
from qcompiler.advisor.measuring import measure_machine
from qcompiler.advisor.options import GOALS, NONE, Candidate, Offer, Option, Taker
from qcompiler.advisor.recommend import Advice, advise
from qcompiler.advisor.shapes import ModelShape, read_shape, told_shape

__all__ = [
    "GOALS",
    "NONE",
    "Advice",
    "Candidate",
    "Hardware",
    "ModelShape",
    "Offer",
    "Option",
    "Taker",
    "advise",
    "cache_bytes",
    "cache_bytes_per_token",
    "find_hardware",
    "known_hardware",
    "measure_machine",
    "read_shape",
    "told_shape",
    "weight_bytes",
    "weight_parts",
]
