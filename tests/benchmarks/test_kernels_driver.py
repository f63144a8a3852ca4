"""The benchmark of the kernels: what crashes, hangs or takes too long costs only itself."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import tables
from benchmarks.kernels.checks import ahead_of_time
from benchmarks.kernels.driver import allot
from benchmarks.kernels.records import Environment, Failure, LeftOut, Verdict, from_fields
from benchmarks.kernels.sections import LOST_DEVICE, SECTIONS, Bench, Case, Section, work
from tests.made_up_worker import made_up_driver

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# A section


def _section(monkeypatch, cases, **fields):
    module = types.ModuleType("benchmarks.kernels.made_up")
    module.cases = lambda bench: iter(cases)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Section("made-up", "Made up", "made_up", 1, **{"mode": "together", **fields})


def _held(name):
    return Case(name, lambda bench: [Verdict("made-up", name, True, "")])


def _run(section, first=0, **options):
    events = []
    code = work(Bench(section, CPU, deadline=options.pop("deadline", float("inf"))), events.append, first, **options)
    return code, events, [from_fields(event["record"]) for event in events if "record" in event]


def test_a_case_that_raises_costs_only_itself(monkeypatch):
    def broken(bench):
        yield Verdict("made-up", "b", True, "")
        raise ValueError("no such luck")

    section = _section(monkeypatch, [_held("a"), Case("b", broken), _held("c")])
    code, events, records = _run(section)
    assert code == 0
    assert [record.name for record in records] == ["a", "b", "b", "c"]
    assert isinstance(records[2], Failure)
    assert "no such luck" in records[2].detail
    assert [event["begin"] for event in events if "begin" in event] == [0, 1, 2]
    assert events[-1] == {"done": True}


def test_a_section_starts_behind_the_case_at_fault(monkeypatch):
    _, _, records = _run(_section(monkeypatch, [_held("a"), _held("b"), _held("c")]), first=2)
    assert [record.name for record in records] == ["c"]


def test_what_does_not_fit_into_the_time_is_left_out(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 3.0])
    section = _section(monkeypatch, [_held(name) for name in "abcd"])
    code, _, records = _run(section, deadline=1.5, clock=lambda: next(now))
    assert code == 0
    assert [(type(record), record.name) for record in records] == [
        (Verdict, "a"),
        (Verdict, "b"),
        (LeftOut, "c"),
        (LeftOut, "d"),
    ]


def test_a_timed_section_measures_its_surroundings_first(monkeypatch):
    _, _, records = _run(_section(monkeypatch, [_held("a")], mode="alone"))
    assert isinstance(records[0], Environment)
    assert records[0].copy_bandwidth > 1e8
    assert "no GPU figure" in records[0].timer


def test_a_process_whose_device_is_lost_ends(monkeypatch):
    def broken(bench):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr("benchmarks.kernels.sections._answers", lambda device: False)
    code, _, records = _run(_section(monkeypatch, [Case("a", broken), _held("b")]))
    assert code == LOST_DEVICE
    assert [record.name for record in records] == ["a"]


def test_what_is_kept_is_made_once_and_let_go_for_another(monkeypatch):
    bench = Bench(_section(monkeypatch, []), CPU)
    made = []
    for key in ("a", "a", "b", "a"):
        bench.keep("slot", key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b", "a"]


def test_a_search_measures_all_copies_and_survives_what_does_not_run(monkeypatch):
    from qcompiler.lowering.kernels.launch import tuning

    bench = Bench(_section(monkeypatch, []), CPU, tune=True)
    searched = []
    monkeypatch.setattr(tuning, "search_launches", lambda *arguments: searched.append(arguments))
    bench.search([lambda: None])
    assert searched == []  # nothing to choose on a CPU
    bench.device = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(tuning, "device_name", lambda device: "H")
    made = []
    bench.search([lambda: made.append(1), lambda: made.append(2)])
    ((run, seconds, device),) = searched
    run()
    assert (made, device) == ([1, 2], "H")
    assert 0 < seconds(run) < 1
    assert seconds(lambda: 1 / 0) == float("inf")


def _fails(reason):
    def make(bench, out_features, in_features):
        raise reason

    return make


def test_a_product_that_pytorch_does_not_have_is_left_out_and_ours_is_not():
    from benchmarks.kernels.times.linear import Format, _timed

    bench = Bench(SECTIONS[-3], CPU, quick=True)
    theirs = Format("w8", _fails(RuntimeError("_int_mm is not\nimplemented")), library=True)
    assert list(_timed("1x64x64 w8", theirs, 64, 64, 1)(bench)) == [
        LeftOut("linear", "1x64x64 w8", "PyTorch: _int_mm is not")
    ]
    ours = Format("w8", _fails(RuntimeError("out of shared memory")))
    with pytest.raises(RuntimeError, match="shared memory"):
        list(_timed("1x64x64 w8", ours, 64, 64, 1)(bench))


# The driver


PART = Section("part", "Part", "none", 1, "together", case_seconds=30.0)


def test_records_come_back_past_what_libraries_print(tmp_path):
    kept = []
    driver = made_up_driver(
        tmp_path, "print('hello'); print('{}'); print(3); held('a'); say(done=True)", keep=kept.append
    )
    assert driver.run([PART]) == [Verdict("part", "a", True, "")]
    assert driver.taken["part"] > 0
    assert kept == [driver.records]


def test_a_crash_costs_the_case_at_fault(tmp_path):
    driver = made_up_driver(
        tmp_path,
        """
        for index in range(first, 4):
            say(begin=index, name=str(index))
            if index == 1:
                sys.stderr.write("CUDA error: an illegal memory access")
                sys.stderr.flush()
                os.kill(os.getpid(), 11)
            held(str(index))
        say(done=True)
        """,
    )
    records = driver.run([PART])
    assert [(type(r), r.name) for r in records] == [(Verdict, "0"), (Failure, "1"), (Verdict, "2"), (Verdict, "3")]
    assert "exit code -11" in records[1].detail
    assert "illegal memory access" in records[1].detail


def test_a_lost_device_is_not_reported_twice(tmp_path):
    driver = made_up_driver(
        tmp_path,
        f"""
        say(begin=first, name=str(first))
        if first == 0:
            say(record={{"kind": "Failure", "section": section, "name": "0", "detail": "illegal"}})
            sys.exit({LOST_DEVICE})
        held(str(first))
        say(done=True)
        """,
    )
    assert [(type(r), r.name) for r in driver.run([PART])] == [(Failure, "0"), (Verdict, "1")]


def test_a_process_that_always_crashes_is_given_up(tmp_path):
    records = made_up_driver(tmp_path, "say(begin=first, name='x'); sys.exit(1)").run([PART])
    assert isinstance(records[-1], LeftOut)
    assert 2 <= sum(isinstance(record, Failure) for record in records) <= 10


def test_a_process_that_does_not_start_is_a_failure(tmp_path):
    records = made_up_driver(tmp_path, "raise ImportError('no module named torch')").run([PART])
    assert isinstance(records[0], Failure)
    assert "no module named torch" in records[0].detail
    assert isinstance(records[1], LeftOut)


def test_a_case_that_hangs_is_stopped_and_the_next_one_run(tmp_path):
    body = """
    for index in range(first, 2):
        say(begin=index, name=str(index))
        time.sleep(60 if index == 0 else 0)
        held(str(index))
    say(done=True)
    """
    section = Section("part", "Part", "none", 1, "together", case_seconds=1.0)
    records = made_up_driver(tmp_path, body).run([section])
    assert [(type(r), r.name) for r in records] == [(Failure, "0"), (Verdict, "1")]
    assert "no result after 1 s" in records[0].detail


def test_a_section_that_does_not_stop_is_stopped_when_its_time_is_over(tmp_path):
    driver = made_up_driver(tmp_path, "say(begin=0, name='slow'); time.sleep(60)", seconds=1.5)
    records = driver.run([PART])
    assert [type(record) for record in records] == [LeftOut, LeftOut]
    assert records[0].name == "slow"
    assert driver.taken["part"] < 10
    assert not tables.has_failed(records)


def test_sections_alone_run_after_those_together_and_beside_none_but_the_background(tmp_path):
    body = f"""
    log = open({str(tmp_path / "log")!r}, "a")
    log.write(f"{{section}} begins\\n"); log.flush()
    time.sleep(1.0 if section == "behind" else 0.1)
    log.write(f"{{section}} ends\\n"); log.flush()
    say(done=True)
    """
    sections = [
        Section("behind", "", "none", 1, "background"),
        Section("first", "", "none", 1, "together"),
        Section("second", "", "none", 2, "alone"),
        Section("third", "", "none", 1, "alone"),
    ]
    made_up_driver(tmp_path, body).run(sections)
    log = (tmp_path / "log").read_text().splitlines()
    assert [line for line in log if "behind" not in line] == [
        f"{name} {what}" for name in ("first", "second", "third") for what in ("begins", "ends")
    ]
    assert log.index("behind begins") < log.index("second begins")


def test_time_that_was_not_used_goes_to_later_sections():
    assert allot(400, 110, [110, 170, 50, 90]) == pytest.approx(400 * 110 / 420)
    assert allot(390, 170, [170, 50, 90]) == pytest.approx(390 * 170 / 310)
    assert allot(80, 90, [90]) == 80
    assert allot(-3, 90, [90]) == 0


# Machine code


def test_every_module_with_kernels_is_compiled():
    folder = ROOT / "lowering" / "kernels"
    expected = {
        f"{path.parent.name}.{path.stem}"
        for path in folder.glob("*/triton_*.py")
        if "def ahead_of_time(" in path.read_text()
    }
    assert {".".join(name.split(".")[-2:]) for name in ahead_of_time.modules()} == expected


def test_the_empty_kernel_compiles_and_is_empty():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "qcompiler.lowering.kernels.launch.machine_code",
        "benchmarks.kernels.empty_triton",
    ]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    codes = [json.loads(line) for line in found.stdout.splitlines()]
    assert [code["capability"] for code in codes] == [80, 90]
    assert all(sum(code["opcodes"].values()) < 8 for code in codes)


def _code(name, failures):
    fields = {"name": name, "capability": 90, "registers": 96, "shared_bytes": 512, "instructions_per_weight": 2.5}
    return json.dumps({**fields, "failures": failures})


def test_what_the_compiler_found_is_held_and_what_it_was_cut_off_at_is_not(monkeypatch):
    lines = [_code("good", []), _code("bad", ["8 bytes spilled"]), _code("cut", [])[:20]]
    code = "import sys; print(sys.argv[2])"
    monkeypatch.setattr(
        ahead_of_time, "_command", lambda job: [sys.executable, "-c", code, job.module, "\n".join(lines)]
    )
    monkeypatch.setattr(ahead_of_time, "modules", lambda: ["a.b_triton"])
    monkeypatch.setattr(ahead_of_time, "_CAPABILITIES", (90,))
    bench = Bench(SECTIONS[0], CPU)
    (case,) = ahead_of_time.cases(bench)
    first, second = case.run(bench)
    assert first == Verdict(
        "machine-code",
        "b_triton sm_90: good",
        True,
        "96 registers, 512 bytes shared, 2.50 instructions per weight",
        2.5,
    )
    assert (second.passed, second.detail) == (False, "8 bytes spilled")


def test_a_compiler_that_does_not_run_is_a_failure(monkeypatch):
    code = "raise SystemExit('no module named triton')"
    monkeypatch.setattr(ahead_of_time, "_command", lambda job: [sys.executable, "-c", code])
    monkeypatch.setattr(ahead_of_time, "modules", lambda: ["a.b_triton"])
    monkeypatch.setattr(ahead_of_time, "_CAPABILITIES", (90,))
    bench = Bench(SECTIONS[0], CPU)
    (verdict,) = next(ahead_of_time.cases(bench)).run(bench)
    assert not verdict.passed
    assert "no module named triton" in verdict.detail


def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch):
    code = f"import time; print({_code('good', [])!r}, flush=True); time.sleep(60)"
    monkeypatch.setattr(ahead_of_time, "_command", lambda job: [sys.executable, "-c", code])
    monkeypatch.setattr(ahead_of_time, "modules", lambda: ["a.b_triton"])
    monkeypatch.setattr(ahead_of_time, "_CAPABILITIES", (90,))
    left = iter([True] * 5)
    monkeypatch.setattr(ahead_of_time, "_has_time", lambda bench: next(left, False))
    bench = Bench(SECTIONS[0], CPU)
    records = list(next(ahead_of_time.cases(bench)).run(bench))
    assert [type(record) for record in records] == [Verdict, LeftOut]


def test_modules_are_compiled_for_both_generations(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "modules", lambda: ["a.b_triton", "a.c_triton"])
    names = [case.name for case in ahead_of_time.cases(Bench(SECTIONS[0], CPU))]
    assert names == ["b_triton sm_90", "c_triton sm_90", "b_triton sm_80", "c_triton sm_80"]


def test_compilers_are_told_the_module_and_what_to_compile_for():
    words = ahead_of_time._command(ahead_of_time.Job("a.b_triton", 80))
    assert words[-4:] == ["qcompiler.lowering.kernels.launch.machine_code", "a.b_triton", "--capability", "80"]
