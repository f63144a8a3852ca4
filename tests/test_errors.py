import inspect

import pytest

from qcompiler import errors
from qcompiler.errors import QCompilerError, WeightError, ZeroCoverageError, did_you_mean

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, QCompilerError) and kind is not QCompilerError
]


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
    assert sorted([kind.__name__ for kind in KINDS] + ["QCompilerError"]) == errors.__all__[:-1]


@pytest.mark.parametrize(
    ("got", "remedy"),
    [
        ("gptq", "did you mean w4a16-gptq or w4a16-awq-gptq?"),
        ("w4a16_gptq", "did you mean w4a16-gptq?"),
        ("W8A8-RTN", "did you mean w8a8-rtn?"),
        ("w4a16-gtpq", "did you mean w4a16-gptq?"),
        ("vllm", None),
        ("", None),
    ],
)
def test_what_was_probably_meant(got, remedy):
    assert did_you_mean(got, ["w4a16-gptq", "w4a16-awq-gptq", "w8a8-rtn"]) == remedy
