import sys
from types import ModuleType

import pytest

from qcompiler.errors import MissingDependencyError, TargetError
from qcompiler.lowering.tensorrt.engine import Api, api, check_capability, find_api, how_to_build


def fake(monkeypatch, name, **attributes):
    """A module of this name; None stands for one that is not installed."""
    module = ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_without_tensorrt_one_message_says_what_to_install(monkeypatch):
    for name in api.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="not installed") as caught:
        find_api()
    assert "pip install tensorrt-rtx" in str(caught.value)
    assert "tensorrt_rtx: " in str(caught.value)


def test_bindings_whose_libraries_are_missing_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvonnxparser.so.11: cannot open shared object')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    fake(monkeypatch, "tensorrt_rtx", __version__="1.0", ComputeCapability=type("C", (), {"SM89": 1, "SM120": 2}))
    assert find_api() == Api("tensorrt_rtx", "1.0", (89, 120))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingDependencyError) as caught:
        find_api()
    assert "libnvonnxparser" in str(caught.value)


def test_tensorrt_comes_first_and_one_may_be_chosen(monkeypatch):
    fake(monkeypatch, "tensorrt", __version__="11.4")
    fake(monkeypatch, "tensorrt_rtx", __version__="1.7", ComputeCapability=type("C", (), {"SM89": 1}))
    assert find_api() == Api("tensorrt", "11.4", None)
    assert find_api("tensorrt_rtx").package == "tensorrt_rtx"
    with pytest.raises(TargetError, match="no TensorRT"):
        find_api("torch")


def test_an_unknown_gpu_is_refused():
    check_capability(Api("tensorrt_rtx", "1.7", (75, 89)), 89)
    with pytest.raises(TargetError, match="does not know") as caught:
        check_capability(Api("tensorrt_rtx", "1.7", (75, 89)), 90)
    assert "SM 75, SM 89" in str(caught.value)
    assert caught.value.remedy == how_to_build(90)
    assert "on a GPU of SM 90" in how_to_build(90)
    assert "without a GPU" in how_to_build(89)


def test_a_builder_for_the_gpu_at_hand_takes_no_other(monkeypatch):
    monkeypatch.setattr(api, "_capability_at_hand", lambda: 90)
    check_capability(Api("tensorrt", "11.4", None), 90)
    with pytest.raises(TargetError, match="GPU at hand") as caught:
        check_capability(Api("tensorrt", "11.4", None), 89)
    assert "got: SM 90" in str(caught.value)
    monkeypatch.setattr(api, "_capability_at_hand", lambda: None)
    with pytest.raises(TargetError, match="GPU at hand") as caught:
        check_capability(Api("tensorrt", "11.4", None), 89)
    assert "got: no GPU" in str(caught.value)


def test_the_first_that_builds_for_a_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(api, "_capability_at_hand", lambda: 90)
    fake(monkeypatch, "tensorrt", __version__="11.4")
    fake(monkeypatch, "tensorrt_rtx", __version__="1.7", ComputeCapability=type("C", (), {"SM89": 1}))
    assert find_api(capability=90).package == "tensorrt"
    assert find_api(capability=89).package == "tensorrt_rtx"
    with pytest.raises(TargetError, match="does not know"):
        find_api(capability=100)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TargetError, match="GPU at hand") as caught:
        find_api(capability=89)
    assert "pip install tensorrt-rtx" in str(caught.value)


def test_the_real_builder_says_what_it_builds_for():
    pytest.importorskip("tensorrt_rtx")
    found = find_api("tensorrt_rtx")
    assert {80, 86, 89, 120} <= set(found.capabilities or ())
    assert found.version[0].isdecimal()
