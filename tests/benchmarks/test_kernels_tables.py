"""The benchmark of the kernels: the arithmetic of its protocol, its goals and its tables."""

import contextlib
import json
import re
import types
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import protocol, tables, weights
from benchmarks.kernels.goals import Goal, attention_goal, linear_goal
from benchmarks.kernels.records import Baseline, Environment, Failure, LeftOut, Time, Verdict, from_fields, to_fields
from benchmarks.kernels.sections import SECTIONS
from benchmarks.kernels.times import timers
from qcompiler.numerics.scheme import Scheme

ROOT = Path(__file__).resolve().parents[2]


# The protocol


@pytest.mark.parametrize(
    ("megabytes", "copies"), [(8.65, 28), (34.6, 7), (23.3, 11), (33.6, 8), (134, 2), (90.2, 3), (1070, 2)]
)
def test_so_many_copies_are_more_than_any_cache_holds(megabytes, copies):
    assert protocol.copies_needed(int(megabytes * 1e6)) == copies


def test_a_larger_cache_asks_for_more_copies():
    assert protocol.copies_needed(34_600_000, l2_bytes=60_000_000) == 7
    assert protocol.copies_needed(34_600_000, l2_bytes=126_000_000) == 15


def test_a_launch_is_its_share_of_the_median_replay():
    assert protocol.per_launch([9.0, 4.0, 8.0, 8.4, 7.0], 4) == 2.0


def test_a_replay_takes_half_a_millisecond():
    assert protocol.rounds_needed(56e-6) == 9
    assert protocol.rounds_needed(2e-3) == 1


def test_bandwidth_is_a_share_of_what_a_copy_moves():
    assert protocol.bandwidth_share(34_600_000, 10e-6, 4e12) == pytest.approx(0.865)


def test_tokens_per_second_count_the_batch():
    assert protocol.tokens_per_second(32, 8e-3) == 4000


def test_a_four_bit_weight_in_groups_of_128_takes_four_and_an_eighth_bits():
    spec = Scheme.parse("w4a16").weight
    weight = weights.affine(64, 256, spec, torch.float16, torch.Generator().manual_seed(0))
    assert weight.stored_bits == 64 * 256 * 4.125
    assert weight.codes.unique().tolist() == list(range(-8, 8))
    assert 0.5 < float(weight.dequantize().std()) * 256**0.5 < 2


def test_a_codebook_keeps_its_share_apart():
    weight = weights.codebook(200, 1000, 3, torch.Generator().manual_seed(0), sparse_share=0.0045)
    assert weight.sparse.values.numel() == pytest.approx(900, rel=0.15)
    assert int(weight.sparse.row_offsets[-1]) == weight.sparse.values.numel()
    assert weight.codes.unique().tolist() == list(range(8))
    assert weight.dequantize().shape == (200, 1000)


def test_the_clock_counts_every_call():
    made = []
    seconds = timers.ClockTimer(replays=4).measure([lambda: made.append(1), lambda: made.append(2)])
    assert made == [1] + 4 * [1, 2]
    assert 0 < seconds < 1e-3


# Goals


def test_goals_are_where_they_were_set():
    assert linear_goal("w4a16", 16, 8192, 8192) == Goal("bandwidth", 0.60, 0.85)
    assert linear_goal("w4a16", 1, 4096, 4096) is None
    assert linear_goal("w4a16", 64, 4096, 14336) == Goal("speedup", 1.2, 1.9)
    assert linear_goal("w4a16", 256, 8192, 8192).least == pytest.approx(1 / 1.3)
    assert linear_goal("w4a16", 2048, 8192, 8192).least == pytest.approx(1 / 1.05)
    assert linear_goal("w8a16", 1, 8192, 8192) == Goal("bandwidth", 0.75)
    assert linear_goal("fp8", 2048, 14336, 4096) == Goal("speedup", 1.6)
    assert linear_goal("fp8", 256, 14336, 4096) is None
    assert attention_goal(32_768) == Goal("bandwidth", 0.70)
    assert attention_goal(4096) is None


def test_a_goal_is_met_judged_by_its_own_figure():
    assert Goal("bandwidth", 0.6).is_met(0.61, 0.1)
    assert Goal("speedup", 1.2).is_met(0.1, 1.19) is False
    assert Goal("speedup", 1.2).is_met(0.9, None) is None


# Tables


def _records():
    shape = "1x8192x8192"
    return [
        Environment("linear", "CUDA graphs", 4e12, 1.5e-6),
        Baseline("linear", shape, "float16", "cuBLAS", 32e-6, 30e-6, 134_000_000),
        Baseline("linear", shape, "bfloat16", "cuBLAS", 30e-6, 30e-6, 134_000_000),
        Time("linear", shape, "w4a16", "ours, triton", 10e-6, 9e-6, 34_600_000),
        Time("linear", shape, "w8a16", "ours, triton", 40e-6, 9e-6, 68_000_000, note="slow"),
        Time("linear", "4x8192x8192", "w4a16", "ours, triton", 10e-6, None, 34_600_000),
        LeftOut("linear", "1x8192x8192 lut3", "out of time"),
        Verdict("check-rows", "quantize_rows float16 int8: 3x96", True, "fine"),
    ]


def test_records_survive_json():
    for record in [*_records(), Failure("linear", "x", "boom")]:
        assert from_fields(json.loads(json.dumps(to_fields(record)))) == record


def test_times_are_compared_with_the_faster_baseline_of_their_shape():
    lines = {(line.time.shape, line.time.name): line for line in tables.lines_of("linear", _records())}
    fast = lines["1x8192x8192", "w4a16"]
    assert fast.speedup == pytest.approx(3.0)
    assert fast.share == pytest.approx(0.865)
    assert fast.met is True
    slow = lines["1x8192x8192", "w8a16"]
    assert slow.speedup == pytest.approx(0.75)
    assert slow.met is False
    assert lines["4x8192x8192", "w4a16"].speedup is None
    assert lines["1x8192x8192", "float16"].speedup is None


def test_the_page_says_what_was_found_and_what_was_not():
    records = [*_records(), Failure("attention", "batch 1", "Traceback\nRuntimeError: a | b"), *_broken_check()]
    page = tables.markdown({"device": "H"}, records, {"linear": 61.4}, is_gpu=True, command="make gpu")
    assert "| 1x8192x8192 | w4a16 | ours, triton | 10.00 | 9.00 | 86% | 3.00× | ≥ 60% (aim 85%) | yes |" in page
    assert "| 1x8192x8192 | w8a16 | ours, triton | 40.00 | 9.00 | 42% | 0.75× | ≥ 75% | **no** |" in page
    assert "| 1x8192x8192 | bfloat16 | cuBLAS | 30.00 | 30.00 | 112% | – |  |  |" in page
    assert "- w8a16, ours, triton: slow" in page
    assert "Left out, out of time: 1x8192x8192 lut3." in page
    assert "Copy bandwidth 4.000 TB/s; an empty kernel takes 1.50 µs." in page
    assert "**batch 1** broke: RuntimeError: a \\| b" in page
    assert "**quantize_rows float16 int8: 5x96** does not hold: error 1" in page
    assert "| quantize_rows float16 int8 | 1 of 2 | error 1 |" in page
    assert "Checks: 1 of 2 hold. Cases that broke: 1. Left out: 1. Goals met: 2 of 3 judged." in page
    assert page.count("Not measured. `make gpu` fills this table.") == len(SECTIONS) - 3
    assert "61 s." in page


def _broken_check():
    return [Verdict("check-rows", "quantize_rows float16 int8: 5x96", False, "error 1")]


def test_decoding_is_told_in_tokens_per_second():
    shape = "32 layers of 4096, batch 32, context 1024"
    records = [
        Environment("decoding", "CUDA graphs", 4e12, 1.5e-6),
        Baseline("decoding", shape, "float16", "PyTorch", 16e-3, None, 1, 32),
        Time("decoding", shape, "w4a16", "ours, triton", 8e-3, None, 1, 32),
    ]
    page = tables.markdown({}, records, {}, is_gpu=True, command="make gpu")
    assert f"| {shape} | w4a16 | ours, triton | 8,000 | – | 0% | 2.00× | 4,000 |" in page
    assert "Not a whole language model" in page


def test_a_page_of_a_cpu_claims_nothing_of_a_gpu():
    page = tables.markdown({"device": "CPU"}, _records(), {}, is_gpu=False, command="c")
    assert "no GPU figures" in page.splitlines()[0]
    assert "They say nothing about the kernels." in page


def test_the_document_holds_records_and_what_follows_from_them(tmp_path):
    tables.write(tmp_path / "new" / "gpu", {"device": "H"}, _records(), {"linear": 1.23}, is_gpu=True, command="c")
    found = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert found["machine"] == {"device": "H"}
    assert found["failed"] is False
    assert found["seconds"] == {"linear": 1.2}
    assert len(found["records"]) == len(_records())
    line = next(line for line in found["lines"] if line["name"] == "w4a16")
    assert line["bandwidth_share"] == pytest.approx(0.865)
    assert line["met"] is True
    assert (tmp_path / "new" / "gpu.md").read_text().startswith("# Kernels on a GPU")


def test_only_what_broke_fails():
    assert not tables.has_failed(_records())  # a goal was missed, and something left out
    assert tables.has_failed([*_records(), *_broken_check()])
    assert tables.has_failed([*_records(), Failure("linear", "x", "boom")])


def test_the_page_in_the_repository_has_every_table():
    page = (ROOT / "benchmarks" / "results" / "gpu.md").read_text()
    assert [f"## {section.title}" for section in SECTIONS] == re.findall("^## .*", page, re.MULTILINE)
    assert "make gpu" in page


class MadeUpCuda:
    """Enough of ``torch.cuda`` for the timer: a clock that launches, and starting a graph, move on."""

    def __init__(self, start_of_a_graph):
        self.now, self.start, self.recorded, self.replays = 0.0, start_of_a_graph, None, []
        self.names = {
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "synchronize": lambda: None,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: MadeUpGraph(self),
            "graph": self.capture,
            "Event": lambda enable_timing: MadeUpEvent(self),
        }
        self.names["current_stream"] = self.names["Stream"]

    def launch(self, seconds):
        if self.recorded is None:
            self.now += seconds
        else:
            self.recorded.append(seconds)

    @contextlib.contextmanager
    def capture(self, graph):
        self.recorded = graph.seconds
        yield
        self.recorded = None


class MadeUpGraph:
    def __init__(self, cuda):
        self.cuda, self.seconds = cuda, []

    def replay(self):
        self.cuda.now += self.cuda.start + sum(self.seconds)
        self.cuda.replays.append(len(self.seconds))

    def reset(self):
        self.seconds = None


class MadeUpEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


@pytest.mark.parametrize(("each", "rounds"), [(2e-6, 27), (1e-3, 1)])
def test_graphs_go_through_all_copies_until_what_starting_them_costs_is_lost(each, rounds, monkeypatch):
    cuda = MadeUpCuda(start_of_a_graph=3e-6)
    for name, value in cuda.names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made = []

    def call(copy):
        made.append(copy)
        cuda.launch(each)

    seconds = timers.GraphTimer().measure([lambda copy=copy: call(copy) for copy in range(8)])
    once = [*range(8)]
    assert made == once + once + (rounds * once if rounds > 1 else [])  # outside a graph, and into one or two
    assert cuda.replays.count(8 * rounds) >= 20
    assert seconds == pytest.approx(each, rel=0.01)
