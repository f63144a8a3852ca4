"""Rotary embeddings as operators: on the CPU, for tracing, and what they refuse."""

import pytest
import torch

from qcompiler.errors import InputError

_ours, _canonical = torch.ops.qcompiler_kernels, torch.ops.qcompiler


def given(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    q, k = torch.randn(2, 4, 5, 12).to(dtype), torch.randn(2, 2, 5, 12).to(dtype)
    angle = torch.rand(2, 1, 5, 12)
    return q, k, angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_they_are_the_canonical_operator(interleaved, dtype):
    q, k, cos, sin = given(dtype)
    exact = [_canonical.rotary(x.float(), cos, sin, interleaved) for x in (q, k)]
    assert torch.equal(_ours.rotary(q, cos, sin, interleaved), exact[0].to(dtype))
    assert torch.equal(_ours.rotary(q, cos, sin, interleaved, torch.float32), exact[0])
    found = _ours.rotary_pair(q, k, cos, sin, interleaved, None, torch.float32)
    assert torch.equal(found[0], exact[0].to(dtype))
    assert torch.equal(found[1], exact[1])


def test_turning_keeps_lengths_and_turns_back():
    x, _, cos, sin = given()
    angle = torch.rand(5, 6)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    turned = _ours.rotary(x, cos, sin, False)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(_ours.rotary(turned, cos, -sin, False), x)


def test_shapes_when_traced():
    q, k, cos, sin = given(torch.float16)
    options = {"test_utils": ("test_faketensor",)}
    torch.library.opcheck(_ours.rotary, (q.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), True), **options)
    torch.library.opcheck(_ours.rotary_pair, (q, k, cos, sin, False, None, torch.float32), **options)


def test_refusals():
    q, k, cos, sin = given()
    for arguments, message in (
        ((q[..., :11], cos, sin), "vectors"),
        ((q.to(torch.int8), cos, sin), "vectors"),
        ((q[None], cos, sin), "vectors"),
        ((q, cos, sin[:, :, :1]), "sines"),
        ((q, cos, sin.half()), "sines"),
        ((q, cos[..., :6], sin[..., :6]), "angles"),
        ((q, cos[:, :, :3], sin[:, :, :3]), "angles"),
        ((q[0], cos, sin), "angles"),
    ):
        with pytest.raises(InputError, match=message):
            _ours.rotary(*arguments, False)
    with pytest.raises(InputError, match="dtype"):
        _ours.rotary(q, cos, sin, False, torch.int8)
    with pytest.raises(InputError, match="keys"):
        _ours.rotary_pair(q, k.half(), cos, sin, False)
