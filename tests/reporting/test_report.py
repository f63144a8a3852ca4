import json
import math

import pytest
import torch

from qcompiler.errors import ArtifactError
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.protocol.pass_base import PassContext, SiteReport, Skip
from qcompiler.reporting.report import (
    CompileReport,
    machine,
    peak_rss_bytes,
    quantized_bits_per_weight,
)
from tests.tiny_graphs import chain


def full_report() -> CompileReport:
    return CompileReport(
        sites=[
            SiteReport("a", "gptq", "int4 g128", 20.5, 0.01, 0.02, 1.5, {"damping": 0.01, "dead": [1, 2]}),
            SiteReport("b", "rtn", "int8", math.inf),
        ],
        skipped=[Skip("head", "assign", "left in float")],
        regions=[
            {
                "name": "norm_1",
                "kind": "scale",
                "producers": ["0.norm_1"],
                "consumers": ["0.q", "0.k"],
                "channels": 16,
                "status": "folded",
                "reason": "",
                "details": {"alpha": 0.5},
            }
        ],
        unrecognized=[{"node": "x", "reason": "y"}],
        notes=["a note"],
        sweeps=1,
        segments=3,
        seconds={"sweep": 1.0},
        cpu_seconds={"total": 2.0},
        peak_rss_bytes=10,
        bytes_before=100,
        bytes_after=30,
        parameters=50,
        calibration={"source": "text", "samples": 4},
        bytes_spilled=7,
        targets={"onnx": {"files": ["model.onnx"], "parity": {"max_difference": 1e-5}}},
    )


def test_round_trip_through_strict_json():
    report = full_report()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert CompileReport.from_dict(json.loads(text)) == report


def test_a_report_of_nothing():
    report = CompileReport()
    assert CompileReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert report.bits_per_weight == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks(value):
    report = full_report()
    report.sites.append(SiteReport("c", "gptq", "int4", 1.0, value, value, 0.0, {"deep": [{"x": value}]}))
    report.targets["onnx"]["parity"]["max_difference"] = value
    report.seconds["sweep"] = value
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["sites"][2]["output_error"] is None
    assert found["sites"][2]["details"] == {"deep": [{"x": None}]}
    assert found["targets"]["onnx"]["parity"]["max_difference"] is None
    assert found["seconds"]["sweep"] is None


def test_fields():
    found = full_report().to_dict()
    assert found["schema"] == 1
    assert found["bits_per_weight"] == 8 * 30 / 50
    assert found["machine"] == machine()
    assert set(machine()) >= {"processor", "threads", "python", "torch", "transformers", "qcompiler"}
    assert all(isinstance(value, str) and value for value in machine().values())


@pytest.mark.parametrize(
    "fields",
    [{"sites": [{}]}, {"sites": [{"sqnr_db": 1.0, "what": 2}]}, {"skipped": [3]}, {"sites": [4]}, {"sites": 5}],
)
def test_damaged_report(fields):
    with pytest.raises(ArtifactError, match="damaged report"):
        CompileReport.from_dict(fields)


def test_a_report_keeps_the_machine_it_was_made_on():
    fields = {**full_report().to_dict(), "machine": {"processor": "another"}}
    assert CompileReport.from_dict(fields).to_dict()["machine"] == {"processor": "another"}
    del fields["machine"]
    assert CompileReport.from_dict(fields).machine == {}


def test_peak_memory_is_of_this_process():
    assert 50e6 < peak_rss_bytes() < 50e9


def test_bits_of_the_quantized_sites_alone():
    graph = chain()
    assert quantized_bits_per_weight(graph) is None
    graph.schemes = {"0": Scheme.parse("w4a16-g4", scale_dtype="float16")}
    RTN().rewrite(graph.sites()[:1], {}, PassContext(graph, torch.device("cpu"), 0))
    assert quantized_bits_per_weight(graph) == 4 + 16 / 4
