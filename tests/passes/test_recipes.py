import pytest

from qcompiler.errors import RecipeError
from qcompiler.passes import AWQ, GPTQ, RECIPES, RTN, Assign, InsertQDQ, Rotate, SqueezeLLM, recipe
from qcompiler.passes.quantize_kv_cache import QuantizeKVCache
from qcompiler.passes.recipes import CACHES
from qcompiler.protocol.pipeline import Pipeline


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_legal_pipeline_of_one_sweep(name):
    passes = recipe(name)
    assert Pipeline(passes).passes == passes
    assert len(Pipeline(passes).stages) == 1


def test_contents():
    assert recipe("w8a16") == (Assign("w8a16"), RTN())
    assert recipe("w4a16-gptq") == (Assign("w4a16"), GPTQ())
    assert recipe("nvfp4") == (Assign("nvfp4"), InsertQDQ(observer="minmax"), GPTQ())
    assert recipe("mxfp4") == (Assign("mxfp4"), InsertQDQ(), GPTQ())
    assert recipe("w3a16-squeezellm") == (Assign("w3a16-lut"), SqueezeLLM())
    plain, rotated = recipe("w4a4-gptq"), recipe("w4a4-rotated")
    assert rotated == (*plain[:1], Rotate(online_heads=True), *plain[1:])  # so that they may be compared
    assert recipe("fp8") == (Assign("fp8"), InsertQDQ(observer="minmax"), GPTQ())


@pytest.mark.parametrize("name", ["w8a8-dynamic", "fp8-dynamic"])
def test_dynamic_recipes_need_no_calibration(name):
    assert not Pipeline(recipe(name)).is_calibrated


def test_unknown_recipe():
    with pytest.raises(RecipeError, match="unknown recipe") as caught:
        recipe("w4a16-magic")
    assert "w4a16-rtn, w4a16-gptq" in str(caught.value)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_a_cache(name, cache):
    passes = recipe(f"{name}+{cache}")
    assert CACHES[cache]() in passes
    assert tuple(item for item in passes if not isinstance(item, QuantizeKVCache)) == recipe(name)
    assert Pipeline(passes).passes == passes
    assert Pipeline(passes).stages[-1].swept[-1] != CACHES[cache]()


def test_the_cache_is_quantized_between_what_rescales_and_what_rounds():
    assert recipe("w4a16-awq-gptq+kv-int8") == (Assign("w4a16"), AWQ(), QuantizeKVCache("int8"), GPTQ())
    assert recipe("kv-int4") == (QuantizeKVCache("int4", rotate=True),)


@pytest.mark.parametrize(
    "name", ["w8a16+kv-int3", "w8a16+", "+kv-int8", "w8a16+kv-int8+kv-fp8", "w8a16+w8a16", "w9+kv-int8"]
)
def test_unknown_cache(name):
    with pytest.raises(RecipeError, match="unknown recipe") as caught:
        recipe(name)
    assert "+kv-fp8, +kv-int8, +kv-int4" in str(caught.value)
