import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.errors import InputError, ResourceError, TargetError
from qcompiler.ir import Port
from qcompiler.lowering.tensorrt.engine import Profile, build, build_engine, default_profiles, parse_profiles


def test_an_engine_is_built_in_a_child(built, decoder, progress):
    assert built.plan.stat().st_size == built.plan_bytes > 10_000
    assert sorted(path.name for path in built.plan.parent.iterdir()) == ["engine-sm89.plan"]
    assert (built.package, built.capability) == ("tensorrt_rtx", 89)
    assert 0 < built.seconds < 60
    assert 50e6 < built.peak_rss_bytes < 1e9
    assert built.warnings == ()
    assert built.to_dict()["plan"] == "engine-sm89.plan"


def test_warnings_of_a_kind_are_counted():
    said = [f"Importer.cpp:416: UINT8 data layers.{i}.zero_point is being converted to INT32." for i in range(3)]
    said += ["Importer.cpp:9: Make sure input ids has Int64 binding.", "Something else.", "Something else."]
    assert build._each_once(said) == (
        "UINT8 data layers.0.zero_point is being converted to INT32. (3 such)",
        "Something else. (2 such)",
    )


def test_progress_is_told(built, progress):
    assert progress[0] == (0, 0, "starting the builder")
    assert (0, 0, "parsing the ONNX file") in progress
    assert progress[-1][2] == "writing the plan"
    steps = [(done, total) for done, total, _ in progress if total]
    assert {total for _, total in steps} == {2}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == 1
    assert {what.partition(":")[0] for _, total, what in progress if total} >= {"profile prefill", "profile decode"}


def test_a_plan_replaces_an_older_one(decoder, ports, tmp_path):
    (tmp_path / "a.plan").write_text("older")
    profiles = default_profiles(ports, length=64)[1:]
    made = build_engine(decoder, tmp_path / "a.plan", capability=89, profiles=profiles)
    assert (tmp_path / "a.plan").stat().st_size == made.plan_bytes > 10_000
    assert {layer.profile for layer in made.layers} == {0}


def test_weights_may_be_streamed_and_a_timing_cache_is_of_no_use_ahead_of_time(decoder, ports, tmp_path):
    profiles = default_profiles(ports, length=64)[1:]
    streamed = build_engine(
        decoder,
        tmp_path / "a.plan",
        capability=120,
        profiles=profiles,
        weight_streaming=True,
        timing_cache=tmp_path / "cache",
        workspace=1 << 28,
    )
    assert streamed.plan_bytes > 0
    assert any("timing cache" in warning for warning in streamed.warnings)
    assert not (tmp_path / "cache").exists()


def refused(tmp_path, model, profiles, expected=TargetError, capability=89):
    """What such a build says; it leaves nothing."""
    plan = tmp_path / "made" / "a.plan"
    with pytest.raises(expected) as caught:
        build_engine(model, plan, capability=capability, profiles=profiles)
    assert not plan.parent.exists()
    return str(caught.value)


def test_a_file_that_the_parser_refuses_names_the_node(tmp_path, ports):
    pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    value, half = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT16
    nodes = [onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="third wheel", domain="com.acme")]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", half, (4,))], [value("y", half, (4,))])
    sets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.acme", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=11), tmp_path / "m.onnx")
    said = refused(tmp_path, tmp_path / "m.onnx", ())
    assert "parser refuses" in said
    assert "Frobnicate third wheel" in said


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "m.onnx").write_text("this is no protobuf")
    assert "m.onnx" in refused(tmp_path, tmp_path / "m.onnx", ())
    assert "no ONNX file" in refused(tmp_path, tmp_path / "none.onnx", (), InputError)


def test_a_gpu_the_builder_does_not_know_is_refused(decoder, tmp_path):
    assert "SM 90" in refused(tmp_path, decoder, (), capability=90)


def test_a_builder_that_fails_says_why(decoder, ports, tmp_path):
    """FP8 products need SM 89."""
    said = refused(tmp_path, decoder, default_profiles(ports, length=64)[:1], capability=80)
    assert "builder failed" in said
    assert "fp8" in said.lower()


def test_an_attention_without_a_kernel_says_what_has_one(tmp_path):
    """Two heads, and a profile fixed at one token; the same with two tokens at most is built."""
    pytest.importorskip("tensorrt_rtx")
    onnx = pytest.importorskip("onnx")
    half, value = onnx.TensorProto.FLOAT16, onnx.helper.make_tensor_value_info
    port = Port("q", "other", "float16", ("batch", 2, "sequence", 64))
    cached = Port("k", "other", "float16", ("batch", 2, "past_sequence", 64))
    node = onnx.helper.make_node("Attention", ["q", "k", "k"], ["y"])
    inputs = [value(p.name, half, p.shape) for p in (port, cached)]
    graph = onnx.helper.make_graph([node], "g", inputs, [value("y", half, None)])
    sets = [onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=11), tmp_path / "m.onnx")
    texts = (f"d:sequence={tokens}:past_sequence=1..64" for tokens in ("1", "1..2"))
    one, two = (parse_profiles(text, (port, cached)) for text in texts)
    said = refused(tmp_path, tmp_path / "m.onnx", one)
    assert "builder failed" in said
    assert "sequence=1..2" in said
    assert build_engine(tmp_path / "m.onnx", tmp_path / "a.plan", capability=89, profiles=two).plan_bytes > 0


def test_profiles_that_do_not_fit_the_model_are_refused(decoder, ports, tmp_path):
    assert "no profile" in refused(tmp_path, decoder, ())
    (prefill, _) = default_profiles(ports, length=64)
    shapes = dict(prefill.shapes)
    assert "lacks an input" in refused(tmp_path, decoder, [Profile("p", {"x": shapes["x"]})])
    wrong = {**shapes, "y": shapes["x"]}
    assert "has an input that the model has not" in refused(tmp_path, decoder, [Profile("p", wrong)])
    wrong = {**shapes, "x": ((1, 1, 64), (1, 1, 64), (1, 1, 65))}
    assert "x of profile p" in refused(tmp_path, decoder, [Profile("p", wrong)])


def child_of(pid: int) -> int:
    """The process that this one started last."""
    for _ in range(200):
        if found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return int(found[-1])
        time.sleep(0.01)
    raise AssertionError("it started none")


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGSEGV, TargetError, "SIGSEGV"),
        (signal.SIGKILL, ResourceError, "no memory left"),
    ],
)
def test_a_child_that_dies_is_an_error(decoder, ports, tmp_path, number, error, said):
    def kill(done, total, what):
        if what == "parsing the ONNX file":
            os.kill(child_of(os.getpid()), number)

    with pytest.raises(error) as caught:
        build_engine(
            decoder,
            tmp_path / "o" / "a.plan",
            capability=89,
            profiles=default_profiles(ports, length=64),
            progress=kill,
        )
    assert said in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_a_builder_without_memory_is_a_resource_error(decoder, ports, tmp_path, monkeypatch):
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nulimit -v 700000\nexec {sys.executable} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(build.sys, "executable", str(wrapper))
    said = refused(tmp_path, decoder, default_profiles(ports, length=64), ResourceError)
    assert "out of memory" in said


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """SIGINT as at a keyboard, also where tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_ends_the_child_and_leaves_nothing(decoder, ports, tmp_path):
    children = []

    def interrupt(done, total, what):
        if what == "parsing the ONNX file":
            children.append(child_of(os.getpid()))
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(
            decoder, tmp_path / "a.plan", capability=89, profiles=default_profiles(ports, length=64), progress=interrupt
        )
    assert not Path(f"/proc/{children[0]}").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_child_ends_with_its_parent(tmp_path):
    """Its standard input is closed then."""
    reading, writing = os.pipe()
    script = f"import sys, time; sys.path.insert(0, {str(build._WORKER.parent)!r}); import worker, threading\n"
    script += "threading.Thread(target=worker._end_with_parent).start(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdin=reading) as child:
        os.close(reading)
        threading.Timer(0.3, os.close, (writing,)).start()
        assert child.wait(timeout=20) == 1
