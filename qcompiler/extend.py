"""A door for guests: what the author of a pass, a statistic, a rewrite of the graph or a target needs, in one place.

A pass derives from `Pass` and says by `Effect` what it may change; a statistic has the methods of `Statistic`, and a
`Tap` asks for it at a value; what a pass did is a `PassResult` of `SiteReport` and `Skip`. Weights become `Affine` or
`Codebook` values under a `QuantSpec`; `numerics` holds the arithmetic. Numbers that an option may take are said by
`Within`. A target derives from `Target`: it answers with `Support`, and gives a `Lowered` that a `Reader` is for;
what runs is an `Artifact`. `check_pass` holds a pass to what it declares. Passes to stand beside, such as `Assign`,
are in `qcompiler.passes`.
"""

from qcompiler import numerics
from qcompiler.errors import CalibrationError, InputError, QCompilerError, RecipeError, TargetError
from qcompiler.ir import Affine, Codebook, Csr, Graph, Segment, Site, is_op
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import (
    ACTIVATIONS_QUANTIZED,
    CANONICAL,
    DROP,
    FLOAT_ACTIVATIONS,
    FLOAT_CACHE,
    FLOAT_WEIGHTS,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    AbsMax,
    Artifact,
    CrossGram,
    Effect,
    Gram,
    Histogram,
    Lowered,
    MinMax,
    Pass,
    PassContext,
    PassResult,
    Reader,
    Rescale,
    SiteReport,
    Skip,
    Statistic,
    Support,
    Tap,
    Target,
    Wave,
    Within,
)
from qcompiler.testing import check_pass

__all__ = [
    "ACTIVATIONS_QUANTIZED",
    "CANONICAL",
    "DROP",
    "FLOAT_ACTIVATIONS",
    "FLOAT_CACHE",
    "FLOAT_WEIGHTS",
    "SCHEMES",
    "WEIGHTS_QUANTIZED",
    "AbsMax",
    "Affine",
    "Artifact",
    "CalibrationError",
    "Codebook",
    "CrossGram",
    "Csr",
    "Effect",
    "Gram",
    "Graph",
    "Histogram",
    "InputError",
    "Lowered",
    "MinMax",
    "Pass",
    "PassContext",
    "PassResult",
    "QCompilerError",
    "QuantSpec",
    "Reader",
    "RecipeError",
    "Rescale",
    "Scheme",
    "Segment",
    "Site",
    "SiteReport",
    "Skip",
    "Statistic",
    "Support",
    "Tap",
    "Target",
    "TargetError",
    "Wave",
    "Within",
    "check_pass",
    "is_op",
    "numerics",
]
