"""What a pass, a pipeline, a statistic, a target and an artifact *are*; nothing concrete.

In: a graph of `qcompiler.ir`. Out: the classes that passes and targets derive from (`pass_base`, `pipeline`, `target`,
`artifact`), what may be gathered at a value of the graph (`statistics`, `histograms`) and the range that is chosen from
it (`ranges`), and two kinds of checks: a pass does what it declares (`declarations`), the graph it leaves is legal
(`verify`).
"""

from qcompiler.protocol.artifact import Artifact, RunsTogether
from qcompiler.protocol.declarations import check_declared, check_exact, state_of
from qcompiler.protocol.devices import choose_device
from qcompiler.protocol.histograms import Histogram, MinMax
from qcompiler.protocol.importing import foreign, import_object
from qcompiler.protocol.options import Within, describe_hint, list_options, read_options, unknown_option
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
    RangeMethod,
    activation_qparams,
    check_range_method,
    check_range_statistic,
    choose_range,
    range_of,
    range_sqnr_db,
)
from qcompiler.protocol.solution import SharedInput, Solution, even_steps, round_to_nearest
from qcompiler.protocol.statistics import (
    AbsMax,
    CrossGram,
    Gram,
    HeadRange,
    RangeStatistic,
    Rescalable,
    RowSample,
    Statistic,
)
from qcompiler.protocol.target import (
    Compilation,
    Lowered,
    Progress,
    Reader,
    Support,
    SupportStatus,
    Target,
    check_caches,
    check_schemes,
    tied_layers,
    with_taken_tables,
)
from qcompiler.protocol.verify import verify_graph
from qcompiler.protocol.weight_quantizer import WeightQuantizer, refuse_codebooks

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
    "Compilation",
    "CrossGram",
    "Effect",
    "Gram",
    "HeadRange",
    "Histogram",
    "Lowered",
    "MinMax",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "Progress",
    "RangeMethod",
    "RangeStatistic",
    "Reader",
    "Rescalable",
    "Rescale",
    "RowSample",
    "RunsTogether",
    "SharedInput",
    "SiteReport",
    "Skip",
    "Solution",
    "Statistic",
    "Support",
    "SupportStatus",
    "Tap",
    "Target",
    "Wave",
    "WeightQuantizer",
    "Within",
    "activation_qparams",
    "check_caches",
    "check_declared",
    "check_exact",
    "check_range_method",
    "check_range_statistic",
    "check_schemes",
    "choose_device",
    "choose_range",
    "describe_hint",
    "even_steps",
    "foreign",
    "import_object",
    "list_options",
    "range_of",
    "range_sqnr_db",
    "read_options",
    "refuse_codebooks",
    "round_to_nearest",
    "state_of",
    "tied_layers",
    "unknown_option",
    "verify_graph",
    "with_taken_tables",
]
