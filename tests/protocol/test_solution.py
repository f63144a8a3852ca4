"""What a weight quantizer gives back, held against what it was asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.errors import VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Affine, Codebook, QuantizedTensor
from qcompiler.numerics import QuantSpec
from qcompiler.passes import Assign
from qcompiler.protocol.pass_base import PassContext
from qcompiler.protocol.solution import (
    SharedInput,
    Solution,
    check_solutions,
    even_steps,
    output_errors,
    round_to_nearest,
)
from tests.tiny_graphs import chain

SCHEMES = ["w4a16-g3", "w3a16-channel-asym", "w8a16-tensor", "fp8", "fp8-block", "nvfp4", "mxfp4", "w3a16-lut"]


def layers_of(scheme: str, count: int = 2) -> SharedInput:
    graph: Graph = chain(count)
    context = PassContext(graph, torch.device("cpu"), 0)
    Assign(scheme, overrides={"*": scheme}).run(graph, context)
    sites = tuple(graph.sites())
    spec = graph.schemes[sites[0].name].weight
    assert spec is not None
    weights = tuple(context.weight(site) for site in sites)
    return SharedInput(sites, weights, None, None, spec, context.scale_dtype(sites[0]), context)


def rounded(layers: SharedInput) -> list[Any]:
    return [round_to_nearest(weight, layers.spec, layers.scale_dtype) for weight in layers.weights]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_round_to_nearest_is_what_every_format_says(scheme: str) -> None:
    layers = layers_of(scheme)
    found = rounded(layers)
    assert check_solutions(found, layers, "guest") == [Solution(item) for item in found]
    given = [Solution(item, {"a": 1}) for item in found]
    assert check_solutions(given, layers, "guest") == given
    for item, weight in zip(found, layers.weights, strict=True):
        expected = even_steps(weight, layers.spec, layers.scale_dtype)
        torch.testing.assert_close(item.dequantize(), expected, rtol=1e-6, atol=1e-6)
        assert numerics.sqnr_db(weight, expected) > 5


def test_a_codebook_of_even_steps() -> None:
    layers = layers_of("w3a16-lut", 1)
    (weight,) = layers.weights
    (found,) = rounded(layers)
    assert isinstance(found, Codebook)
    assert found.table.shape == (8, 8)
    assert bool((found.table.diff() > 0).all())
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    torch.testing.assert_close(found.table[:, -1] - found.table[:, 0], high - low)
    assert float((weight - found.dequantize()).abs().max()) <= float(found.table.diff().max()) * 0.51


WRONG: list[tuple[str, Callable[[Any], object], str]] = [
    ("w4a16-g3", lambda a: replace(a, codes=a.codes[:, :-1]), "codes: torch.int8 (8, 7), not torch.int8 (8, 8)"),
    ("w4a16-g3", lambda a: replace(a, codes=a.codes.short()), "codes: torch.int16 (8, 8), not torch.int8 (8, 8)"),
    ("w4a16-g3", lambda a: replace(a, codes=a.codes + 9), "not -8 to 7"),
    ("w3a16-channel-asym", lambda a: replace(a, codes=a.codes + 1), "codes from 1 to 8, not 0 to 7"),
    ("w4a16-g3", lambda a: replace(a, scale=a.scale[:, :1]), "scale: torch.float32 (8, 1), not torch.float32 (8, 3)"),
    ("w8a16-tensor", lambda a: replace(a, scale=a.scale[0, 0]), "scale: torch.float32 (), not torch.float32 (1, 1)"),
    ("w4a16-g3", lambda a: replace(a, scale=a.scale.half()), "scale: torch.float16"),
    ("w4a16-g3", lambda a: replace(a, scale_dtype=torch.float16), "scale_dtype is torch.float16, not torch.float32"),
    ("w4a16-g3", lambda a: replace(a, zero_point=a.scale.byte()), "a zero point where the scheme is symmetric"),
    (
        "w3a16-channel-asym",
        lambda a: replace(a, zero_point=None),
        "a zero point where the scheme is symmetric, or none",
    ),
    ("w3a16-channel-asym", lambda a: replace(a, zero_point=a.zero_point.int()), "zero_point: torch.int32"),
    ("w4a16-g3", lambda a: replace(a, spec=QuantSpec("int4", "per_group", 4)), "spec is int4 g4 symmetric"),
    ("w4a16-g3", lambda a: a.dequantize(), "a value of type Tensor"),
    ("w4a16-g3", lambda a: None, "a value of type NoneType"),
    ("w4a16-g3", lambda a: Codebook(a.codes, a.scale, None, a.spec), "a value of type Codebook"),
    ("nvfp4", lambda a: replace(a, factor=None), "no factor where scales are relative to one"),
    ("w4a16-g3", lambda a: replace(a, factor=torch.tensor(1.0)), "or one where they are not"),
    ("fp8", lambda a: replace(a, codes=a.codes.float()), "codes: torch.float32 (8, 8), not torch.float8_e4m3fn (8, 8)"),
    ("w3a16-lut", lambda c: replace(c, table=c.table[:, :4]), "table: torch.float32 (8, 4), not torch.float32 (8, 8)"),
    ("w3a16-lut", lambda c: replace(c, table=c.table.half()), "table: torch.float16"),
    ("w3a16-lut", lambda c: replace(c, codes=c.codes + 1), "codes from 1 to 8, not 0 to 7"),
    ("w3a16-lut", lambda c: Affine(c.codes, c.table, None, c.spec, torch.float32), "a value of type Affine"),
]


@pytest.mark.parametrize(("scheme", "spoil", "got"), WRONG, ids=[f"{s}: {got}" for s, _, got in WRONG])
def test_what_does_not_fit_is_one_error_that_names_the_layer(
    scheme: str, spoil: Callable[[Any], Any], got: str
) -> None:
    layers = layers_of(scheme)
    first, second = rounded(layers)
    for wrong in (spoil(second), Solution(spoil(second))):
        with pytest.raises(VerificationError, match="guest gave something else") as caught:
            check_solutions([first, wrong], layers, "guest")
        assert caught.value.where == "1"
        assert got in str(caught.value.got)
        assert str(layers.spec) in str(caught.value.expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_as_there_are_layers(count: int) -> None:
    layers = layers_of("w4a16-g3")
    found: Sequence[QuantizedTensor] = (rounded(layers) * 2)[:count]
    with pytest.raises(VerificationError) as caught:
        check_solutions(found, layers, "guest")
    assert caught.value.where == "0"
    assert caught.value.got == f"{count} weights for 2 layers"


def test_errors_of_the_output() -> None:
    layers = layers_of("w4a16-g3", 1)
    (weight,), (found,) = layers.weights, rounded(layers)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    assert output_errors(weight, Solution(found), layers) == (None, None)
    known = replace(layers, gram=x.T @ x)

    def relative(other: Tensor) -> float:
        return float((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum())

    nearest = relative(found.dequantize())
    coarse = round_to_nearest(weight, replace(layers.spec, group_size=8), torch.float32)
    ours, theirs = output_errors(weight, Solution(coarse), known)
    assert ours == pytest.approx(relative(coarse.dequantize()), rel=1e-4)
    assert theirs == pytest.approx(nearest, rel=1e-4)
    energy = float((x @ weight.T).square().sum())
    ours, theirs = output_errors(weight, Solution(found, loss=energy, rtn_loss=2 * energy), known)
    assert ours == pytest.approx(1, rel=1e-5)
    assert theirs == pytest.approx(2, rel=1e-5)
    silent = replace(layers, gram=torch.zeros(8, 8))
    assert output_errors(weight, Solution(found), silent) == (0, 0)
