"""What a pass, a pipeline, a statistic, a target and an artifact *are*; nothing concrete.

In: a graph of `qcompiler.ir`. Out: the classes that passes and targets derive from, and the checks that hold them to
what they declare (`verify`).
"""

from qcompiler.protocol.artifact import Artifact
from qcompiler.protocol.histograms import Histogram, MinMax
from qcompiler.protocol.observers import (
    AbsMax,
    CrossGram,
    Gram,
    HeadRange,
    RangeStatistic,
    Rescalable,
    RowSample,
    Statistic,
)
from qcompiler.protocol.options import Within, describe_hint
from qcompiler.protocol.pass_base import (
    ACTIVATIONS_QUANTIZED,
    CACHE_QUANTIZED,
    CANONICAL,
    DROP,
    FISHER,
    FLOAT_ACTIVATIONS,
    FLOAT_CACHE,
    FLOAT_WEIGHTS,
    SCHEMES,
    WEIGHTS_QUANTIZED,
    CalibrationRun,
    Effect,
    Pass,
    PassContext,
    PassResult,
    Rescale,
    SiteReport,
    Skip,
    Tap,
    Wave,
)
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.ranges import (
    Method,
    activation_qparams,
    check_method,
    check_range_statistic,
    choose_range,
    range_of,
    range_sqnr_db,
)
from qcompiler.protocol.target import (
    Support,
    TargetSpec,
    check_caches,
    check_schemes,
)
from qcompiler.protocol.verify import (
    check_declared,
    check_exact,
    state_of,
    verify_graph,
)

__all__ = [
    "ACTIVATIONS_QUANTIZED",
    "CACHE_QUANTIZED",
    "CANONICAL",
    "DROP",
    "FISHER",
    "FLOAT_ACTIVATIONS",
    "FLOAT_CACHE",
    "FLOAT_WEIGHTS",
    "SCHEMES",
    "WEIGHTS_QUANTIZED",
    "AbsMax",
    "Artifact",
    "CalibrationRun",
    "CrossGram",
    "Effect",
    "Gram",
    "HeadRange",
    "Histogram",
    "Method",
    "MinMax",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "RangeStatistic",
    "Rescalable",
    "Rescale",
    "RowSample",
    "SiteReport",
    "Skip",
    "Statistic",
    "Support",
    "Tap",
    "TargetSpec",
    "Wave",
    "Within",
    "activation_qparams",
    "check_caches",
    "check_declared",
    "check_exact",
    "check_method",
    "check_range_statistic",
    "check_schemes",
    "choose_range",
    "describe_hint",
    "range_of",
    "range_sqnr_db",
    "state_of",
    "verify_graph",
]
