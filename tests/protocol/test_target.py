"""Asking targets about schemes."""

import pytest

from qcompiler.errors import TargetError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.protocol.target import Support, check_caches, check_schemes


class Narrow:
    """A target that takes groups of 32 only."""

    name = "narrow"

    def supports(self, scheme: Scheme, width: int) -> Support:
        assert scheme.weight is not None
        if scheme.weight.group_size != 32:
            return Support("refused", "groups of 32")
        return Support("fused" if width % 32 == 0 else "runs")

    def supports_cache(self, spec: CacheFormat) -> Support:
        return Support("refused", "8 bits") if spec.bits < 8 else Support("runs")

    def check_graph(self, graph: Graph) -> None:
        pass


class Wide:
    name = "wide"

    def supports(self, scheme: Scheme, width: int) -> Support:
        return Support("writes-only")

    def supports_cache(self, spec: CacheFormat) -> Support:
        return Support("fused")

    def check_graph(self, graph: Graph) -> None:
        pass


def test_every_target_answers_for_every_site():
    schemes = {"a": Scheme.parse("w4a16-g32"), "b": Scheme.parse("w8a16-g32")}
    assert check_schemes(schemes, {"a": 64, "b": 65}, [Narrow(), Wide()]) == {
        "narrow": {"a": Support("fused"), "b": Support("runs")},
        "wide": {"a": Support("writes-only"), "b": Support("writes-only")},
    }


def test_a_refusal_names_target_site_and_reason():
    with pytest.raises(TargetError) as caught:
        check_schemes({"a": Scheme.parse("w4a16-g64")}, {"a": 64}, [Wide(), Narrow()])
    assert (caught.value.where, caught.value.expected) == ("narrow: a", "groups of 32")
    assert caught.value.got == "int4 g64 symmetric"


def test_a_refusal_needs_a_reason():
    with pytest.raises(ValueError, match="reason"):
        Support("refused")


def test_every_target_answers_for_every_format_of_a_cache():
    int8, int4 = CacheFormat("int8"), CacheFormat("int4")
    assert check_caches([int8], [Narrow(), Wide()]) == {
        "narrow": {"int8 per token symmetric": Support("runs")},
        "wide": {"int8 per token symmetric": Support("fused")},
    }
    with pytest.raises(TargetError, match="cache of this format") as caught:
        check_caches([int8, int4], [Wide(), Narrow()])
    assert (caught.value.where, caught.value.expected) == ("narrow", "8 bits")
