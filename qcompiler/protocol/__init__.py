"""What a pass, a pipeline, a statistic, a target and an artifact *are*; nothing concrete.

In: a graph of `qcompiler.ir`. Out: the classes that passes and targets derive from, and the checks that hold them to
what they declare (`verify`).
"""

from qcompiler.protocol.artifact import Artifact
from qcompiler.protocol.devices import choose_device
from qcompiler.protocol.histograms import Histogram, MinMax
from qcompiler.protocol.importing import foreign, import_object
from qcompiler.protocol.observers import AbsMax, CrossGram, Gram, HeadRange, Rescalable, RowSample, Statistic
from qcompiler.protocol.options import Within, describe_hint, list_options, read_options
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
    choose_range,
    range_sqnr_db,
)
from qcompiler.protocol.target import (
    Lowered,
    Reader,
    Support,
    Target,
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
    "Lowered",
    "Method",
    "MinMax",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "Reader",
    "Rescalable",
    "Rescale",
    "RowSample",
    "SiteReport",
    "Skip",
    "Statistic",
    "Support",
    "Tap",
    "Target",
    "Wave",
    "Within",
    "activation_qparams",
    "check_caches",
    "check_declared",
    "check_exact",
    "check_method",
    "check_schemes",
    "choose_device",
    "choose_range",
    "describe_hint",
    "foreign",
    "import_object",
    "list_options",
    "range_sqnr_db",
    "read_options",
    "state_of",
    "verify_graph",
]
