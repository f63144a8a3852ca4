import pytest

from qcompiler.cli.options import _override, parse_bytes, parse_overrides, parse_targets
from qcompiler.errors import InputError, RecipeError, TargetError
from qcompiler.lowering.kernels import KernelsTarget
from qcompiler.lowering.onnx import OnnxTarget


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", 0), ("512", 512), ("1K", 1024), ("4GB", 4 << 30), ("1.5GiB", 3 << 29), ("2 tb".replace(" ", ""), 2 << 40)],
)
def test_amounts_of_memory(text: str, found: int) -> None:
    assert parse_bytes(text) == found


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "nan", "inf"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_bytes(text)
    assert caught.value.got == text


def test_overrides() -> None:
    assert _override("lm_head=w8a16-g64") == ("lm_head", "w8a16-g64")
    assert _override("*.0.*=none") == ("*.0.*", None)
    for text in ("lm_head", "=w8a16"):
        with pytest.raises(RecipeError):
            _override(text)


def test_several_overrides() -> None:
    texts = ["a*=w8a16", "b=none", "a*=w8a16"]
    assert list(parse_overrides(texts).items()) == [("b", None), ("a*", "w8a16")]  # the last match wins
    with pytest.raises(RecipeError, match="one pattern") as caught:
        parse_overrides([*texts, "a*=w4a16"])
    assert caught.value.got == "a*=w8a16, a*=w8a16, a*=w4a16"


def test_targets() -> None:
    assert parse_targets(["onnx:opset=23,float=float16"]) == {"onnx:opset=23,float=float16": OnnxTarget(23, "float16")}
    assert parse_targets([]) == {}
    assert parse_targets(["kernels:device=cpu"]) == {"kernels:device=cpu": KernelsTarget("cpu")}
    with pytest.raises(TargetError, match="named twice") as caught:
        parse_targets(["onnx", "onnx:opset=23"])
    assert caught.value.got == "onnx, onnx"
