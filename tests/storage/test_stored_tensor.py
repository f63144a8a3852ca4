import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qcompiler.errors import WeightError
from qcompiler.numerics.packing import pack_bits
from qcompiler.storage.weights import WeightStore


def codes(shape: tuple[int, ...], bits: int, signed: bool) -> torch.Tensor:
    """Every code of the range, ends included."""
    low = -(1 << (bits - 1)) if signed else 0
    values = torch.arange(torch.Size(shape).numel()).remainder(1 << bits) + low
    return values.to(torch.int8 if signed else torch.uint8).reshape(shape)


@pytest.mark.parametrize("shape", [(), (1,), (37,), (5, 13), (2, 3, 8), (0,), (3, 0), (0, 4)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_packed_integers_survive_memory_and_disk(tmp_path, bits, signed, shape):
    dtype = f"{'' if signed else 'u'}int{bits}"
    value = codes(shape, bits, signed)
    store = WeightStore.from_tensors({})
    store.set("q", value, dtype)
    store.save(tmp_path)
    rows = value.numel() // shape[-1] if shape and shape[-1] else (value.numel() if not shape else 0)
    width = (shape or (1,))[-1]
    for where in (store, WeightStore.from_directory(tmp_path)):
        info = where.info("q")
        assert (info.dtype, info.shape, info.nbytes) == (dtype, shape, rows * ((width * bits + 7) // 8))
        read = where.read("q")
        assert read.dtype == value.dtype
        assert read.shape == value.shape
        assert torch.equal(read, value)


def test_packed_file_is_plain_safetensors(tmp_path):
    value = codes((4, 6), 4, True)
    store = WeightStore.from_tensors({"w": torch.ones(2)})
    store.set("q", value, "int4")
    store.save(tmp_path, metadata={"origin": "test"})
    plain = load_file(tmp_path / "model.safetensors")
    assert torch.equal(plain["q"], pack_bits(value, 4))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["origin"] == "test"
    assert json.loads(metadata["qcompiler"])["packed"] == {"q": {"dtype": "int4", "shape": [4, 6]}}


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([8], dtype=torch.int8), "int4"),
        (torch.tensor([-9], dtype=torch.int8), "int4"),
        (torch.tensor([8], dtype=torch.uint8), "uint3"),
        (torch.tensor([1], dtype=torch.uint8), "int4"),
        (torch.tensor([1], dtype=torch.int8), "uint4"),
        (torch.tensor([1.0]), "int4"),
        (torch.tensor([1.0]), "float16"),
        (torch.tensor([1], dtype=torch.int8), "int9"),
        (torch.tensor([1], dtype=torch.int8), "int0"),
        (torch.ones(2, dtype=torch.complex64), None),
        (torch.ones(2, device="meta"), None),
        (torch.ones(2, 2).to_sparse(), None),
    ],
)
def test_what_cannot_be_stored_is_refused(value, dtype):
    store = WeightStore.from_tensors({})
    with pytest.raises(WeightError):
        store.set("q", value, dtype)
    assert "q" not in store


PACKED = {"q": {"dtype": "int4", "shape": [2, 4]}}


@pytest.mark.parametrize(
    "ours",
    [
        "not json",
        "[]",
        {"packed": {}, "aliases": {}},
        {"schema": 2, "packed": {}, "aliases": {}},
        {"schema": 1, "aliases": {}},
        {"schema": 1, "packed": PACKED, "aliases": []},
        {"schema": 1, "packed": {"other": PACKED["q"]}, "aliases": {}},
        {"schema": 1, "packed": {"q": {"dtype": "int4", "shape": [2, 5]}}, "aliases": {}},
        {"schema": 1, "packed": {"q": {"dtype": "int2", "shape": [2, 4]}}, "aliases": {}},
        {"schema": 1, "packed": {"q": {"dtype": "int8", "shape": [2, 2]}}, "aliases": {}},
        {"schema": 1, "packed": {"q": {"dtype": "int4", "shape": [2, 4.0]}}, "aliases": {}},
        {"schema": 1, "packed": {"q": {"dtype": "int4", "shape": [2, -4]}}, "aliases": {}},
        {"schema": 1, "packed": {"q": 4}, "aliases": {}},
        {"schema": 1, "packed": PACKED, "aliases": {"x": "nowhere"}},
        {"schema": 1, "packed": PACKED, "aliases": {"x": ["q"]}},
        {"schema": 1, "packed": PACKED, "aliases": {"q": "q"}},
    ],
)
def test_damaged_metadata(tmp_path, ours):
    def write(content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        save_file({"q": torch.ones(2, 2, dtype=torch.uint8)}, tmp_path / "model.safetensors", {"qcompiler": text})

    write({"schema": 1, "packed": PACKED, "aliases": {"x": "q"}})
    assert WeightStore.from_directory(tmp_path).info("x").shape == (2, 4)
    write(ours)
    with pytest.raises(WeightError) as caught:
        WeightStore.from_directory(tmp_path)
    assert "model.safetensors" in str(caught.value.where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(tmp_path, dtype, bad):
    value = torch.ones(64, 33)
    value[40, 7] = bad
    save_file({"good": torch.ones(2), "bad": value.to(dtype)}, tmp_path / "model.safetensors")
    store = WeightStore.from_directory(tmp_path)
    assert torch.equal(store.read("good"), torch.ones(2))
    store.derive("derived", ("bad",), lambda w: torch.ones(1), dtype="float32", shape=(1,))
    for name in ("bad", "derived"):
        with pytest.raises(WeightError, match="not finite") as caught:
            store.read(name)
        assert caught.value.where == f"{tmp_path / 'model.safetensors'}: bad"
        assert "1 NaN" in str(caught.value.got) or "1 infinite" in str(caught.value.got)
    assert not store.read("bad", check_finite=False).float().isfinite().all()


def test_the_largest_finite_values_pass(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        extreme = torch.full((4096,), torch.finfo(dtype).max).to(dtype)  # a sum would overflow
        assert WeightStore.from_tensors({"w": extreme}).read("w").dtype == dtype
