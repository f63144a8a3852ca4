"""What people see: the report as plain values and as a page, tables and progress in a terminal.

In: what a compilation did. Out: `CompileReport`, ``report.html``, lines on standard error.
"""

from qcompiler.reporting.report import (
    CompileReport,
    machine,
    peak_rss_bytes,
    quantized_bits_per_weight,
    strict_json,
)
from qcompiler.reporting.report_html import render_report
from qcompiler.reporting.terminal import print_rows, print_table, show_progress

__all__ = [
    "CompileReport",
    "machine",
    "peak_rss_bytes",
    "print_rows",
    "print_table",
    "quantized_bits_per_weight",
    "render_report",
    "show_progress",
    "strict_json",
]
