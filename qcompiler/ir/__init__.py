"""The graph: operators, values, weights behind names, and how to run it.

In: what the frontend traced. Out: `Graph`, which everything else reads and rewrites; `ops` are its operators,
`qtensor` what a quantized weight is, `segments` where it may be cut, `execute` the interpreter,
`run_by_segments` one that reads few weights at a time.
"""

from qcompiler.ir.cache_format import FLOAT_CACHES, CacheFormat
from qcompiler.ir.execute import Stretch, makes_a_tensor
from qcompiler.ir.experts import is_expert, routed_from, routers
from qcompiler.ir.feeding import empty_cache, feed, feed_run, feed_tensors
from qcompiler.ir.graph import (
    Graph,
    Site,
    activation_rounding,
    is_op,
    is_quantized_weight,
    quantized_value,
    site_name,
    stored_names,
    symbolic_size,
)
from qcompiler.ir.kv_cache import Cache, cache_rounding, float_caches, keep_range, quantize_cache
from qcompiler.ir.memory import Trimmer, free_memory
from qcompiler.ir.qtensor import Affine, Codebook, Csr, QuantizedTensor
from qcompiler.ir.run_by_segments import Around, results_of, run_by_segments
from qcompiler.ir.segments import Segment, SegmentedGraph, segment_graph
from qcompiler.ir.signature import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Dim,
    Part,
    Port,
    Role,
    Signature,
)
from qcompiler.ir.static_cache import (
    QuantizedCache,
    cache_formats,
    formats_by_cache,
    quantized_caches,
    static_caches,
    static_qparams,
)
from qcompiler.ir.tables import (
    Table,
    float_tables,
    has_codes_of_table,
    quantize_table,
    quantized_tables,
    with_float_tables,
)
from qcompiler.ir.walks import ancestors, descendants, nearest_sites

__all__ = [
    "BATCH",
    "FLOAT_CACHES",
    "PAST",
    "SEQUENCE",
    "TOTAL",
    "Affine",
    "Around",
    "Cache",
    "CacheFormat",
    "Codebook",
    "Csr",
    "Dim",
    "Graph",
    "Part",
    "Port",
    "QuantizedCache",
    "QuantizedTensor",
    "Role",
    "Segment",
    "SegmentedGraph",
    "Signature",
    "Site",
    "Stretch",
    "Table",
    "Trimmer",
    "activation_rounding",
    "ancestors",
    "cache_formats",
    "cache_rounding",
    "descendants",
    "empty_cache",
    "feed",
    "feed_run",
    "feed_tensors",
    "float_caches",
    "float_tables",
    "formats_by_cache",
    "free_memory",
    "has_codes_of_table",
    "is_expert",
    "is_op",
    "is_quantized_weight",
    "keep_range",
    "makes_a_tensor",
    "nearest_sites",
    "quantize_cache",
    "quantize_table",
    "quantized_caches",
    "quantized_tables",
    "quantized_value",
    "results_of",
    "routed_from",
    "routers",
    "run_by_segments",
    "segment_graph",
    "site_name",
    "static_caches",
    "static_qparams",
    "stored_names",
    "symbolic_size",
    "with_float_tables",
]
