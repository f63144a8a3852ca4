"""Taking codes out of words: the inline assembly, emulated instruction by instruction, and its plain twin."""

import inspect
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from qcompiler.lowering.kernels.cache import triton_codes as codes_triton

WORDS = np.arange(65536, dtype=np.uint32)
PARTNERS = np.random.default_rng(0).permutation(WORDS)


def emulate(assembly, register, outputs):
    """What a block of PTX leaves in its outputs, of one input register per element; uint32 arrays."""
    registers = {f"${outputs}": register}

    def value(name):
        name = name.strip()
        return np.full_like(register, int(name, 0)) if re.match(r"0x|\d", name) else registers[name]

    def halves(array):
        return array.view(np.uint16).reshape(-1, 2).view(np.float16)

    def packed(array):
        return np.ascontiguousarray(array.astype(np.float16)).view(np.uint32).reshape(-1)

    for line in assembly.strip("{} \n").split(";"):
        line = line.strip()
        if not line or line.startswith("."):
            continue
        name, rest = line.split(None, 1)
        into, *others = re.findall(r"\{[^}]*\}|[^,]+", rest.replace(", ", ","))
        given = [value(other) for other in others if not other.startswith("{")]
        match name.split(".")[0]:
            case "mov" if into.startswith("{"):
                low, high = into.strip("{}").split(",")
                registers[low.strip()], registers[high.strip()] = given[0] & 0xFFFF, given[0] >> 16
                continue
            case "mov":
                result = given[0]
            case "xor":
                result = given[0] ^ given[1]
            case "and":
                result = given[0] & given[1]
            case "shl":
                result = given[0] << given[1]
            case "shr":
                result = given[0] >> given[1]
            case "lop3":
                assert given[3][0] == 0xEA  # (a and b) or c
                result = (given[0] & given[1]) | given[2]
            case "prmt":
                both = np.concatenate(
                    [given[0].view(np.uint8).reshape(-1, 4), given[1].view(np.uint8).reshape(-1, 4)], 1
                )
                places = [(int(given[2][0]) >> (4 * i)) & 7 for i in range(4)]
                result = np.ascontiguousarray(both[:, places]).view(np.uint32).reshape(-1)
            case "sub":
                result = packed(halves(given[0]) - halves(given[1]))
            case "fma":
                a, b, c = (halves(g).astype(np.float64) for g in given)
                result = packed(a * b + c)
            case "cvt":
                pairs = np.stack([given[0] & 0xFF, given[0] >> 8], 1).astype(np.uint8)
                floats = torch.from_numpy(pairs).view(torch.float8_e4m3fn).to(torch.float16)
                result = packed(floats.numpy())
            case other:
                raise AssertionError(f"unknown instruction {other}")
        registers[into.strip()] = result.astype(np.uint32)
    return [halves(registers[f"${i}"]) for i in range(outputs)]


def bytes_of(words):
    return np.stack([words & 0xFF, words >> 8], 1).astype(np.uint8)


def nibbles_of(words):
    return np.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], 1).astype(np.int64)


def exact(kind):
    """The values of the codes of every word ``[65536, codes]``."""
    if kind == "int4":
        return nibbles_of(WORDS) - 8
    as_bytes = torch.from_numpy(bytes_of(WORDS))
    if kind == "fp8":
        return as_bytes.view(torch.float8_e4m3fn).float().numpy()
    return as_bytes.view(torch.int8).numpy() if kind == "int8" else as_bytes.numpy().astype(np.int64) - 128


@pytest.mark.parametrize(
    ("assembly", "kind", "factor"),
    [
        (codes_triton.INT8_WORDS, "int8", 1),
        (codes_triton.UINT8_WORDS, "uint8", 1),
        (codes_triton.FLOAT8_WORDS, "fp8", 1),
        (codes_triton.FLOAT8_BITS, "fp8", 256),
        (codes_triton.INT4_WORDS, "int4", 1),
    ],
)
def test_assembly_gives_the_exact_value_of_every_code(assembly, kind, factor):
    want = exact(kind)
    found = emulate(assembly.value, WORDS | (PARTNERS << 16), want.shape[1])
    for part, halves in enumerate(found):
        for place, words in ((0, WORDS), (1, PARTNERS)):
            expected, got = want[words, part].astype(np.float64), halves[:, place].astype(np.float64) * factor
            number = ~np.isnan(expected)
            np.testing.assert_array_equal(got[number], expected[number])
            if factor == 1:
                assert np.isnan(got[~number]).all()
            else:
                assert (np.abs(got[~number]) == 480).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("kind", ["int8", "uint8", "fp8", "int4"])
def test_the_plain_twin_gives_the_same(kind):
    from tests.lowering.kernels.launch.code_kernels import take_apart

    words = torch.from_numpy(WORDS.astype(np.uint16))
    per = 4 if kind == "int4" else 2
    out = torch.empty(per, len(words), dtype=torch.float16)
    take_apart[(16,)](words, out, len(words), KIND=kind, SIZE=4096)
    want = torch.from_numpy(exact(kind).astype(np.float32)).T
    number = ~want.isnan()
    assert torch.equal(out.float()[number] * (256 if kind == "fp8" else 1), want[number])


def test_outputs_share_no_register_with_the_input():
    """Blocks of assembly read their input after they have written the first output."""
    for function in (codes_triton.two_codes, codes_triton.four_codes):
        source = getattr(function, "src", None) or inspect.getsource(function.fn)
        assert "=&r,=&r," in source
        assert "=r," not in source
