import pytest

from qcompiler.errors import RecipeError
from qcompiler.passes import GPTQ, RECIPES, RTN, Assign, InsertQDQ, recipe
from qcompiler.pipeline import Pipeline


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_legal_pipeline_of_one_sweep(name):
    passes = recipe(name)
    assert Pipeline(passes).passes == passes
    assert len(Pipeline(passes).stages) == 1


def test_contents():
    assert recipe("w8a16") == (Assign("w8a16"), RTN())
    assert recipe("w4a16-gptq") == (Assign("w4a16"), GPTQ())
    assert recipe("nvfp4") == (Assign("nvfp4"), InsertQDQ(observer="minmax"), GPTQ())
    assert recipe("mxfp4") == (Assign("mxfp4"), InsertQDQ(observer=None), GPTQ())
    assert recipe("fp8") == (Assign("fp8"), InsertQDQ(observer="minmax"), GPTQ())


@pytest.mark.parametrize("name", ["w8a8-dynamic", "fp8-dynamic"])
def test_dynamic_recipes_need_no_calibration(name):
    assert not Pipeline(recipe(name)).is_calibrated


def test_unknown_recipe():
    with pytest.raises(RecipeError, match="unknown recipe") as caught:
        recipe("w4a16-magic")
    assert "w4a16-rtn, w4a16-gptq" in str(caught.value)
