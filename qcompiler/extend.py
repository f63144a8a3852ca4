"""A door for guests: what the author of a pass, a statistic, a rewrite of the graph or a target needs, in one place.

A pass derives from `Pass` and says by `Effect` what it may change; a statistic has the methods of `Statistic`, and a
`Tap` asks for it at a value; what a pass did is a `PassResult` of `SiteReport` and `Skip`. Weights become `Affine`
or `Codebook` values under a `QuantSpec`; `numerics` holds the arithmetic. Numbers that an option may take
are said by `Within`. A target answers as a `TargetSpec`, with `Support`; what runs is an `Artifact`. `check_pass` holds
a pass to what it declares. Passes to stand beside, such as `Assign`, are in `qcompiler.passes`.

A `RangeStatistic` chooses ranges of activations for `InsertQDQ`. A pass that rewrites the `Graph` inserts operators
into it, or applies a `Rule` by `apply_rules`: it looks for calls by `expect`, raises `Miss` where something does not
fit, and puts others in their place by `replace_call`.
"""

from qcompiler import numerics
from qcompiler.errors import CalibrationError, InputError, QCompilerError, RecipeError, TargetError, VerificationError
from qcompiler.frontend import Miss, Rule, apply_rules, expect, replace_call
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
    MinMax,
    Pass,
    PassContext,
    PassResult,
    RangeStatistic,
    Rescale,
    SiteReport,
    Skip,
    Statistic,
    Support,
    Tap,
    TargetSpec,
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
    "MinMax",
    "Miss",
    "Pass",
    "PassContext",
    "PassResult",
    "QCompilerError",
    "QuantSpec",
    "RangeStatistic",
    "RecipeError",
    "Rescale",
    "Rule",
    "Scheme",
    "Segment",
    "Site",
    "SiteReport",
    "Skip",
    "Statistic",
    "Support",
    "Tap",
    "TargetError",
    "TargetSpec",
    "VerificationError",
    "Wave",
    "Within",
    "apply_rules",
    "check_pass",
    "expect",
    "is_op",
    "numerics",
    "replace_call",
]
