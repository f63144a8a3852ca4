"""Where the numbers of a tensor come from."""

import torch

from qcompiler.storage import WeightStore, rearrangement


def test_it_goes_back_through_what_moves_numbers():
    store = WeightStore.from_tensors({name: torch.randn(2, 3) for name in "ab"})
    store.derive("turned", ("a",), torch.t, dtype="float32", shape=(3, 2), rearranges=True)
    both = {"dtype": "float32", "shape": (4, 3), "rearranges": True}
    store.derive("both", ("turned", "b"), lambda turned, b: torch.cat([b, turned.t()]), **both)
    versions = {store.version(name): name for name in "ab"}
    found = rearrangement(store.version("both"), versions)
    assert found is not None
    assert [versions[version] for version in found[0]] == ["a", "b"]
    assert torch.equal(found[1](store.read("a"), store.read("b")), store.read("both"))


def test_it_is_the_tensor_itself():
    store = WeightStore.from_tensors({"a": torch.randn(2, 3)})
    version = store.version("a")
    found = rearrangement(version, {version})
    assert found is not None
    assert found[0] == (version,)
    assert torch.equal(found[1](store.read("a")), store.read("a"))


def test_other_numbers_have_no_origin():
    store = WeightStore.from_tensors({name: torch.randn(2, 3) for name in "ab"})
    store.derive("twice", ("a",), lambda a: 2 * a, dtype="float32", shape=(2, 3))
    options = {"dtype": "float32", "shape": (4, 3), "rearranges": True}
    store.derive("both", ("twice", "b"), lambda *parts: torch.cat(parts), **options)
    versions = {store.version(name) for name in "ab"}
    assert rearrangement(store.version("twice"), versions) is None
    assert rearrangement(store.version("both"), versions) is None
    assert rearrangement(store.version("b"), {store.version("a")}) is None
