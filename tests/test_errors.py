import inspect

import pytest

from qcompiler import errors
from qcompiler.errors import QCompilerError, WeightError, ZeroCoverageError

KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind is not QCompilerError]


def test_message_names_everything_that_is_known():
    error = WeightError("a shard is missing", where="model.safetensors", got=0, expected="one file", remedy="get it")
    assert str(error) == (
        "a shard is missing\n  where: model.safetensors\n  got: 0\n  expected: one file\n  remedy: get it"
    )
    assert str(WeightError("a shard is missing")) == "a shard is missing"


def test_json_fields_are_never_missing():
    assert ZeroCoverageError("no tokens", where=("a", 1)).to_dict() == {
        "type": "ZeroCoverageError",
        "what": "no tokens",
        "where": "('a', 1)",
        "got": None,
        "expected": None,
        "remedy": None,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_ours_and_exported(kind):
    assert issubclass(kind, QCompilerError)
    assert kind.__name__ in errors.__all__


def test_all_is_complete():
    assert sorted([kind.__name__ for kind in KINDS] + ["QCompilerError"]) == errors.__all__
