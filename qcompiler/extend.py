"""A door for guests: what the author of a pass, a statistic, a rewrite of the graph or a target needs, in one place.

A rounding of one's own derives from `WeightQuantizer` and is one function: from a weight, its `QuantSpec` and the
`Gram` matrix of its input to a `QuantizedTensor`, which is an `Affine` or a `Codebook`; a `Solution` tells more, and
layers that read one input can be solved together as a `SharedInput`. `numerics` holds the arithmetic,
`round_to_nearest` is what a rounding is measured against.

Any other pass derives from `Pass` and says by `Effect` what it may change; a statistic has the methods of
`Statistic`, and a `Tap` asks for it at a value; what a pass did is a `PassResult` of `SiteReport` and `Skip`. Numbers
that an option may take are said by `Within`. A target derives from `Target`: it answers with `Support`, and gives a
`Lowered` that a `Reader` is for, and that may finish its files by what the `Compilation` was; what runs is an
`Artifact`. `check_pass` holds a pass to what it declares. Passes to stand beside, such as `Assign`, are in
`qcompiler.passes`.

A `RangeStatistic` chooses ranges of activations for `InsertQDQ`. A pass that rewrites the `Graph` inserts operators
into it, or applies a `Rule` by `apply_rules`: it looks for calls by `expect`, raises `Miss` where something does not
fit, and puts others in their place by `replace_call`.
"""

from qcompiler import numerics
from qcompiler.errors import CalibrationError, InputError, QCompilerError, RecipeError, TargetError, VerificationError
from qcompiler.frontend import Miss, Rule, apply_rules, expect, replace_call
from qcompiler.ir import Affine, Codebook, Csr, Graph, QuantizedTensor, Segment, Site, is_op
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
    Compilation,
    CrossGram,
    Effect,
    Gram,
    Histogram,
    Lowered,
    MinMax,
    Pass,
    PassContext,
    PassResult,
    RangeStatistic,
    Reader,
    Rescale,
    SharedInput,
    SiteReport,
    Skip,
    Solution,
    Statistic,
    Support,
    Tap,
    Target,
    Wave,
    WeightQuantizer,
    Within,
    round_to_nearest,
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
    "Compilation",
    "CrossGram",
    "Csr",
    "Effect",
    "Gram",
    "Graph",
    "Histogram",
    "InputError",
    "Lowered",
    "MinMax",
    "Miss",
    "Pass",
    "PassContext",
    "PassResult",
    "QCompilerError",
    "QuantSpec",
    "QuantizedTensor",
    "RangeStatistic",
    "Reader",
    "RecipeError",
    "Rescale",
    "Rule",
    "Scheme",
    "Segment",
    "SharedInput",
    "Site",
    "SiteReport",
    "Skip",
    "Solution",
    "Statistic",
    "Support",
    "Tap",
    "Target",
    "TargetError",
    "VerificationError",
    "Wave",
    "WeightQuantizer",
    "Within",
    "apply_rules",
    "check_pass",
    "expect",
    "is_op",
    "numerics",
    "replace_call",
    "round_to_nearest",
]
