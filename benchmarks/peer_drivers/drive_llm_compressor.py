"""llm-compressor: ``rtn``, ``gptq`` (static act-order), ``awq``; ``-mse``: scales by least squared error."""

from typing import Any

from protocol import Request, load_model, measured, read_request, versions, write_result
from torch import Tensor, nn


def _recipe(method: str) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    observer = "memoryless_mse" if method.endswith("-mse") else "memoryless_minmax"
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=128, observer=observer
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    options: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    match method:
        case "rtn" | "rtn-mse":
            return [QuantizationModifier(**options)]
        case "gptq" | "gptq-mse":
            return [GPTQModifier(actorder="static", dampening_frac=0.01, **options)]
        case "awq":
            # It pins its cache even where there is no accelerator, which fails; pinning matters to speed alone.
            IntermediatesCache.pin_memory = lambda *_: None
            return [AWQModifier(), QuantizationModifier(**options)]
    raise SystemExit(f"unknown method {method!r}")


def _effective(model: nn.Module) -> dict[str, Tensor]:
    """All weights that the quantized model computes with: codes times scales where a module is quantized."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    weights = {
        name: tensor for name, tensor in model.named_parameters() if not name.split(".")[-1].startswith("weight_")
    }
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            weights[f"{name}.weight"] = fake_quantize(
                module.weight.data, module.weight_scale, getattr(module, "weight_zero_point", None), scheme.weights
            )
    return weights


def main(request: Request) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    model = load_model(request)
    samples, length = request.tokens.shape
    rows = Dataset.from_dict({"input_ids": request.tokens.tolist(), "attention_mask": [[1] * length] * samples})
    options: dict[str, Any] = {}
    if not request.method.startswith("rtn"):
        options = {
            "dataset": rows,
            "max_seq_length": length,
            "num_calibration_samples": samples,
            "shuffle_calibration_samples": False,
        }
    recipe = _recipe(request.method)
    model, numbers = measured(
        lambda: oneshot(model=model, processor=request.model, recipe=recipe, log_dir=None, **options)
    )
    write_result(request, numbers, _effective(model), versions=versions("llmcompressor", "torch", "transformers"))


if __name__ == "__main__":
    main(read_request())
