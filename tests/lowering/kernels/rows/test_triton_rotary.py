"""The Triton kernel of rotary embeddings against its reference, interpreted or on a GPU, and its machine code."""

import pytest
import torch

pytest.importorskip("triton")
from qcompiler.lowering.kernels.rows import triton_rotary as module
from qcompiler.lowering.kernels.rows.rotary import rotary_reference
from tests.lowering.kernels.launch.ahead_of_time import inspect

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def heads(dtype: torch.dtype, batch: int, count: int, tokens: int, width: int) -> torch.Tensor:
    """As a projection leaves them: heads behind tokens."""
    return torch.randn(batch, tokens, count, width, device=DEVICE).to(dtype).transpose(1, 2)


def tables(*shape: int) -> list[torch.Tensor]:
    """Cosines and sines, other ones for every channel."""
    angle = 6.3 * torch.rand(*shape, device=DEVICE)
    return [angle.cos(), angle.sin()]


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a step of the dtype: products may be added without rounding, and the interpreter truncates bfloat16."""
    assert (found.dtype, found.shape, found.is_contiguous()) == (expected.dtype, expected.shape, True)
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=1.01 * eps, atol=4 * torch.finfo().eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("config", [None, module.Config(4, 4)])
def test_queries_and_keys_together(dtype, interleaved, config):
    for width in (2, 12, 32):
        q, k = heads(dtype, 2, 4, 5, width), heads(dtype, 2, 1, 5, width)
        cos, sin = tables(2, 1, 5, width)
        found = module.launch([q, k], cos, sin, interleaved, [None, torch.float32], config=config)
        assert_near(found[0], rotary_reference(q, cos, sin, interleaved).contiguous())
        assert_near(found[1], rotary_reference(k, cos, sin, interleaved, torch.float32).contiguous())


@pytest.mark.parametrize("shape", [(7, 12), (1, 1, 7, 12), (3, 1, 7, 12), (3, 5, 7, 12), (1, 1, 1, 12)])
def test_tables_of_every_shape(shape):
    x = heads(torch.float16, 3, 5, 7, 12)
    cos, sin = tables(*shape)
    assert_near(module.launch([x], cos, sin, False, [None])[0], rotary_reference(x, cos, sin, False).contiguous())
    cos = cos.transpose(-1, -2).contiguous().transpose(-1, -2)  # not like the sines, and of columns
    assert_near(module.launch([x], cos, sin, True, [None])[0], rotary_reference(x, cos, sin, True).contiguous())


def test_tokens_ahead_of_heads_parts_of_vectors_and_fewer_axes():
    x = torch.randn(2, 7, 3, 20, device=DEVICE)
    cos, sin = tables(2, 7, 1, 12)
    for part in (x[..., :12], x[..., 8:], x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)[..., :12]):
        found = module.launch([part], cos, sin, True, [None])[0]
        assert_near(found, rotary_reference(part, cos, sin, True).contiguous())
    for flat in (x[0, 0, :, :12], x[0, 0, 0, :12]):
        cos, sin = tables(12)
        assert_near(module.launch([flat], cos, sin, False, [None])[0], rotary_reference(flat, cos, sin, False))


def test_nothing_to_turn():
    q, k = heads(torch.float32, 2, 0, 5, 12), heads(torch.float32, 2, 2, 5, 12)
    cos, sin = tables(5, 12)
    for pair in ([q, k], [k, q], [q, q]):
        found = module.launch(pair, cos, sin, False, [None, None])
        for mine, x in zip(found, pair, strict=True):
            assert_near(mine, rotary_reference(x, cos, sin, False).contiguous())


def test_many_vectors_share_programs():
    for pairs in (1, 16, 128, 1024):
        few, many = module.default_config(1, pairs), module.default_config(1 << 20, pairs)
        assert (few, many) == module.configs(pairs)
        assert many.rows & (many.rows - 1) == 0
        assert few.rows == 1


def compiled(match: str = "", *, capabilities: tuple[int, ...] = (80, 90)) -> list[dict]:
    found = inspect("rows.triton_rotary", match, capabilities=capabilities)
    assert {entry["name"]: entry["failures"] for entry in found if entry["failures"]} == {}
    return found


def test_default_configurations_compile_without_spills():
    found = compiled("pair-halves-64", capabilities=(90,))
    assert {entry["name"] for entry in found} == {"pair-halves-64-1-1-default", "pair-halves-64-8-4-default"}
    assert all(entry["opcodes"]["LDG"] == 12 for entry in found)  # halves of vectors and tables, once


@pytest.mark.slow
def test_all_configurations_compile_without_spills():
    assert len({entry["name"] for entry in compiled()}) == 4 * 2 * 2 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_on_a_gpu(seed):
    random = torch.Generator().manual_seed(seed)
    batch, count, tokens, half = (int(torch.randint(1, top, (), generator=random)) for top in (5, 33, 400, 129))
    dtype, interleaved = DTYPES[seed % 3], seed % 2 == 1
    q, k = heads(dtype, batch, count, tokens, 2 * half), heads(dtype, batch, 2, tokens, 2 * half)
    cos, sin = tables(batch, 1, tokens, 2 * half)
    first = torch.ops.qcompiler_kernels.rotary_pair(q, k, cos, sin, interleaved, None, torch.float32)
    assert_near(first[0], rotary_reference(q, cos, sin, interleaved).contiguous())
    assert_near(first[1], rotary_reference(k, cos, sin, interleaved, torch.float32).contiguous())
    poison = torch.full_like(first[1], float("nan"))
    del poison
    again = module.launch([q, k], cos, sin, interleaved, [None, torch.float32])
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])
