"""The advice itself: the published decision tree falls out of memory, rates and expected losses; and bad input."""

import json
from typing import Any

import pytest
import typer

import qcompiler as qc
from qcompiler import api
from qcompiler.advice import fit_targets, hardware_named, recommend
from qcompiler.advisor import Advice, Option
from qcompiler.cli.commands import app
from qcompiler.cli.options import parse_targets
from qcompiler.errors import InputError, TargetError
from tests.advisor.models import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_1B,
    LLAMA_3_8B,
    LLAMA_30B,
    MIXTRAL,
)

LONG: dict[str, Any] = {"positions": 1 << 17}

TREE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("h100", LLAMA_3_8B, {}, "fp8+kv-fp8-static"),
    ("h100", LLAMA_3_8B, {"batch": 1}, "fp8+kv-fp8-static"),
    ("h100-pcie", LLAMA_2_13B, {}, "fp8+kv-fp8-static"),
    ("h200", LLAMA_2_70B, {"context": 32768, "batch": 4}, "fp8+kv-fp8-static"),
    # what does not fit in 8 bits
    ("h100", LLAMA_2_70B, {}, "w4a16-awq+kv-fp8-static"),
    ("h100", LLAMA_2_70B, {"context": 32768, "batch": 1}, "w4a16-awq+kv-fp8-static"),
    # the most tokens, to be verified
    ("h100", LLAMA_2_70B, {"goal": "throughput"}, "w4a16-awq+kv-int4"),
    ("h100", LLAMA_2_13B, {"goal": "throughput", "context": 8192}, "w4a16-awq+kv-int4"),
    ("a100", LLAMA_2_13B, {"goal": "throughput", "context": 8192}, "w4a16-awq+kv-int4"),
    # no products of 8-bit floats
    ("a100", LLAMA_3_8B, {"goal": "latency", "batch": 1, "context": 512}, "w4a16-awq"),
    ("a100", LLAMA_2_70B, {"goal": "latency", "batch": 1, "context": 2048}, "w4a16-awq"),
    ("a100", LLAMA_3_8B, {"goal": "latency", "batch": 256, "context": 512}, "w8a8-smoothquant+kv-int8"),
    ("a100", LLAMA_3_8B, {"batch": 64}, "w8a8-smoothquant+kv-int8"),
    ("a100", LLAMA_3_8B, {"context": 64}, "w8a8-smoothquant"),
    ("a100", LLAMA_3_8B, {"context": 65536, "batch": 1}, "w8a8-smoothquant+kv-int8"),
    ("a100", LLAMA_3_8B, {"goal": "latency", "context": 65536, "batch": 1}, "w4a16-awq+kv-int8"),
    # one person's cards
    ("rtx-3090", LLAMA_30B, {"context": 512}, "w4a16-awq"),
    ("rtx-4090", LLAMA_30B, {}, "w4a16-awq+kv-fp8-static"),
    ("rtx-3090", LLAMA_2_7B, {"context": 512}, "w8a16"),
    ("rtx-3090", LLAMA_2_13B, {}, "w8a16+kv-int8"),
    ("rtx-4090", LLAMA_2_7B, {}, "w8a16+kv-fp8-static"),
    ("rtx-4090", LLAMA_2_13B, {"context": 512}, "w8a16+kv-fp8-static"),
    ("rtx-3090", LLAMA_2_13B, {"context": 49152}, "w4a16-awq+kv-int4"),
    ("rtx-4090", LLAMA_2_13B, {"context": 49152}, "w4a16-awq+kv-int4"),
    ("rtx-4090", LLAMA_2_7B, {"context": 65536}, "w8a16+kv-int4"),
    # small models: 8 bits, whatever is asked for
    ("h100", LLAMA_3_1B, {"goal": "latency"}, "fp8+kv-fp8-static"),
    ("a100", LLAMA_3_1B, {}, "w8a16+kv-int8"),
    ("rtx-4090", LLAMA_3_1B, {"goal": "latency"}, "w8a16"),
    ("mi300x", LLAMA_2_70B, {}, "fp8+kv-fp8-static"),
    ("mi325x", LLAMA_3_8B, {}, "fp8+kv-fp8-static"),
    ("h100", LLAMA_3_8B, {"goal": "training"}, "none"),
]


@pytest.mark.parametrize(
    ("gpu", "sizes", "use", "recipe"), TREE, ids=[f"{gpu}-{row}" for row, (gpu, *_) in enumerate(TREE)]
)
def test_the_decision_tree(gpu: str, sizes: dict[str, Any], use: dict[str, Any], recipe: str) -> None:
    assert recommend(gpu=gpu, **use, **sizes, **LONG).recipe == recipe


@pytest.fixture(scope="module")
def on_h100() -> Advice:
    return recommend(gpu="h100", **LLAMA_3_8B, **LONG)


def _option(advice: Advice, name: str) -> Option:
    return next(option for option in advice.options if option.candidate.name == name)


def test_the_public_name() -> None:
    assert qc.recommend is recommend


def test_the_numbers_of_an_option(on_h100: Advice) -> None:
    first, plain = on_h100.first, _option(on_h100, "none")
    elements = on_h100.question.shape.parameters
    assert sum(plain.parts.values()) == 2 * elements
    layers = elements - on_h100.question.shape.others - 2 * 128256 * 4096
    assert sum(first.parts.values()) == pytest.approx(2 * elements - layers, rel=1e-3)  # and scales
    assert (plain.cache_per_token, first.cache_per_token) == (131_072, 65_536)
    assert first.footprint.cache == 8 * 4096 * 65_536
    assert first.left == pytest.approx(72e9 - first.footprint.total)
    assert first.gpus_needed == 1
    assert [taker.engine for taker in first.takers] == ["vLLM", "qcompiler"]
    assert plain.decode.seconds > first.decode.seconds
    read = plain.footprint.weights - plain.parts["table"] + plain.footprint.cache
    assert plain.decode.seconds == pytest.approx(read / 3.35e12)
    assert plain.prefill is not None
    assert first.prefill is not None
    assert 1.5 < plain.prefill / first.prefill < 2


def test_the_longest_context_is_the_last_that_fits(on_h100: Advice) -> None:
    longest = _option(on_h100, "none").longest_context

    def fits(context: int) -> bool:
        found = recommend(gpu="h100", recipes=["none", "kv-int4"], context=context, **LLAMA_3_8B, **LONG)
        return "none" in {option.candidate.name for option in found.options}

    assert fits(longest)
    assert not fits(longest + 1)


def test_each_of_the_others_has_a_reason(on_h100: Advice) -> None:
    reasons = on_h100.reasons()
    others = {option.candidate.name for option in on_h100.options[1:]} | {item.name for item in on_h100.refused}
    assert reasons.keys() == others
    assert "does not multiply float4" in reasons["nvfp4"]
    assert "loses more" in reasons["w4a16-awq+kv-fp8-static"]
    assert "slower: reads" in reasons["fp8"]
    assert "multiplied slower" in reasons["w8a16+kv-fp8-static"]
    assert "not taken from a file" in reasons["fp8+kv-int8"]
    assert "its cache loses more" in reasons["fp8+kv-int4"]
    assert "no better" in reasons["fp8+kv-fp8-static-head"]


def test_what_does_not_fit_says_by_how_much() -> None:
    found = recommend(gpu="h100", **LLAMA_2_70B)
    reason = found.reasons()["fp8"]
    assert "GB too much" in reason
    assert "fits 2 GPUs" in reason
    two = recommend(gpu="h100", gpus=2, **LLAMA_2_70B)
    assert two.recipe == "fp8+kv-fp8-static"
    assert two.first.footprint.weights == pytest.approx(sum(two.first.parts.values()) / 2, rel=1e-3)


def test_an_a100_has_no_float8() -> None:
    reasons = recommend(gpu="a100", **LLAMA_3_8B).reasons()
    assert "does not multiply float8" in reasons["fp8"]
    assert "has no float8: int8 caches" in reasons["w8a16+kv-fp8-static"]


def test_amd_has_no_kernels_of_ours() -> None:
    found = recommend(gpu="mi300x", **LLAMA_3_8B)
    assert "nothing takes it" in found.reasons()["fp8+kv-int4"]
    assert {taker.text.partition(":")[0] for option in found.options for taker in option.takers} == {"checkpoint"}


def test_targets_are_asked_for_every_width(on_h100: Advice) -> None:
    odd = {**LLAMA_3_8B, "intermediate": 14336 + 8}
    found = recommend(gpu="h100", **odd)
    texts = {taker.text for taker in _option(found, "w4a16-awq").takers} if found.recipe != "w4a16-awq" else set()
    assert texts < {taker.text for taker in _option(on_h100, "w4a16-awq").takers}


def test_experts_are_read_as_far_as_they_are_touched() -> None:
    one, many = (recommend(gpu="h200", batch=batch, context=64, **MIXTRAL).options for batch in (1, 64))
    assert one[0].decode.reading < 0.4 * sum(one[0].parts.values()) / 4.8e12
    assert many[0].decode.reading > 0.9 * sum(many[0].parts.values()) / 4.8e12


def test_when_not_to_quantize(on_h100: Advice) -> None:
    notes = " ".join(on_h100.notes)
    assert "no faster than 8-bit products from a batch of 1" in notes
    assert "training: do not quantize" in notes
    slow = recommend(gpu="a100", batch=512, context=64, goal="latency", **LLAMA_3_8B)
    assert "multiplies longer than it reads" in " ".join(slow.notes)
    assert "slower: multiplies" in slow.reasons()["w4a16-awq"]
    only = recommend(gpu="h100", goal="training", **LLAMA_3_8B)
    assert only.notes[0].startswith("training: do not quantize")
    assert only.command() is None


def test_a_felt_loss_says_what_would_lose_less() -> None:
    found = recommend(gpu="rtx-3090", context=8192, **LLAMA_30B)
    assert max(found.first.levels) == 2
    assert any("loses less, and fits with --context 4096" in note for note in found.notes)
    assert any("verify it" in note for note in found.notes)


def test_it_is_plain_json(on_h100: Advice) -> None:
    fields = json.loads(json.dumps(on_h100.to_dict(), allow_nan=False))
    assert fields["recommendation"] == "fp8+kv-fp8-static"
    assert fields["options"][0]["expected_loss_of_weights"]["source"]
    assert fields["options"][0]["command"] == on_h100.command()
    assert fields["model"]["parts"]["mlp"] == 3 * 32 * 4096 * 14336
    assert fields["refused"]["nvfp4"]


@pytest.mark.parametrize(("gpu", "sizes"), [("h100", LLAMA_3_8B), ("a100", LLAMA_2_13B), ("grace", LLAMA_3_8B)])
def test_each_command_is_one_that_runs(gpu: str, sizes: dict[str, Any]) -> None:
    found = recommend(gpu=gpu, **sizes)
    group = typer.main.get_command(app)
    for option in found.options:
        command = found.command(option)
        if command is None:
            assert option.candidate.name == "none"
            continue
        program, name, *arguments = command.split()
        assert program == "qcompiler"
        parsed = group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        assert str(parsed.params["model"]) == "MODEL"
        assert api.describe_recipe(parsed.params["recipe"])["passes"]
        assert len(parse_targets(parsed.params["to"])) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"gpu": "h10"}, "unknown hardware"),
        ({"gpu": "h100", "goal": "speed"}, "unknown goal"),
        ({"gpu": "h100", "context": 0}, "without sense"),
        ({"gpu": "h100", "context": -5}, "without sense"),
        ({"gpu": "h100", "batch": 0}, "without sense"),
        ({"gpu": "h100", "batch": 10**9}, "without sense"),
        ({"gpu": "h100", "context": 1.5}, "without sense"),
        ({"gpu": "h100", "context": 10**9}, "without sense"),
        ({"gpu": "h100", "gpus": 0}, "without sense"),
        ({"gpu": "h100", "gpus": 3}, "do not divide among the GPUs"),
        ({"gpu": "h100", "context": 8192, "positions": 4096}, "longer than the model takes"),
    ],
)
def test_absurd_questions(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        recommend(**arguments, **LLAMA_3_8B)


def test_nothing_fits() -> None:
    with pytest.raises(InputError, match="nothing fits") as caught:
        recommend(gpu="rtx-3090", **LLAMA_2_70B)
    assert "GB too much" in str(caught.value.got)
    assert "GB less on each GPU" in str(caught.value.expected)
    for way in ("--gpus 2", "--gpu rtx-5090"):
        assert way in str(caught.value.remedy)
    with pytest.raises(InputError, match="nothing fits") as caught:
        recommend(gpu="rtx-3090", context=1 << 20, **LLAMA_3_8B)
    assert "--context 262144" in str(caught.value.remedy)
    assert recommend(gpu="rtx-3090", context=262144, **LLAMA_3_8B).options


def test_a_model_or_its_sizes(tmp_path: Any) -> None:
    for arguments in ({}, {"model": tmp_path, "layers": 2}):
        with pytest.raises(InputError, match="either a model directory or its sizes"):
            recommend(gpu="h100", **arguments)


def test_targets_that_are_named() -> None:
    found = recommend(gpu="rtx-4090", targets=["tensorrt"], goal="latency", **LLAMA_3_8B)
    assert {taker.text for option in found.options for taker in option.takers} == {"tensorrt:sm=89"}
    assert found.recipe == "w4a16-awq"
    both = recommend(gpu="rtx-4090", targets=["tensorrt", "checkpoint"], **LLAMA_3_8B)
    assert fit_targets(both, ["tensorrt", "tensorrt:float=float32", "checkpoint"]) == [
        "tensorrt:sm=89",
        "tensorrt:float=float32,sm=89",
        "checkpoint",
    ]
    assert fit_targets(both, ["tensorrt:sm=120"]) == ["tensorrt:sm=120"]
    with pytest.raises(InputError, match="no recipe runs"):  # with a cache of 8-bit floats
        fit_targets(both, ["tensorrt:sm=80"])


def test_the_layout_follows_the_recipe() -> None:
    found = recommend(gpu="h100", recipes=["w4a16-awq"], **LLAMA_3_8B)
    layouts = {taker.text for taker in found.first.takers}
    assert {"checkpoint", "checkpoint:format=awq", "checkpoint:format=gptq", "kernels"} <= layouts
    with pytest.raises(TargetError, match="unknown target"):
        recommend(gpu="h100", targets=["checkpint"], **LLAMA_3_8B)
    with pytest.raises(InputError, match="no recipe runs"):
        recommend(gpu="h100", recipes=["w4a16-squeezellm"], targets=["checkpoint"], **LLAMA_3_8B)


def test_hardware_of_ones_own() -> None:
    a100 = hardware_named("a100")
    assert recommend(gpu=a100, **LLAMA_3_8B).question.hardware is a100
