"""NVIDIA ModelOpt: ``rtn``, ``awq`` (awq_lite, its INT4 default), ``awq-clip``, ``gptq`` and ``gptq-layerwise``.

With rounded activations, ranges fixed in calibration: ``int8`` (its INT8 default), ``smoothquant`` and ``fp8`` (its
defaults of these names).
"""

import copy
from typing import Any

from protocol import Request, evaluate, load_model, measured, read_request, versions, write_result
from torch import Tensor, nn

ROUNDS_ACTIVATIONS = ("int8", "smoothquant", "fp8")


def _config(method: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    algorithms: dict[str, Any] = {
        "awq-clip": {"method": "awq_clip"},
        "awq-full": {"method": "awq_full"},
        "gptq": {"method": "gptq", "perc_damp": 0.01},
        "gptq-layerwise": {"method": "gptq", "perc_damp": 0.01, "layerwise": {"enable": True}},
    }
    presets = {
        "awq": mtq.INT4_AWQ_CFG,
        "int8": mtq.INT8_DEFAULT_CFG,
        "smoothquant": mtq.INT8_SMOOTHQUANT_CFG,
        "fp8": mtq.FP8_DEFAULT_CFG,
    }
    if method in presets:
        return copy.deepcopy(presets[method])
    if method != "rtn" and method not in algorithms:
        raise SystemExit(f"unknown method {method!r}")
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    if method in algorithms:
        config["algorithm"] = algorithms[method]
    return config


def _effective(model: nn.Module) -> dict[str, Tensor]:
    """All weights that the quantized model computes with.

    A pre-quantization scale multiplies the input of its layer: (x·s)·Wᵀ is x·(W·s)ᵀ, so it goes into the columns.
    """
    weights = {name: tensor for name, tensor in model.named_parameters() if "quantizer" not in name}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        weight = quantizer(module.weight.data.float())
        scale = getattr(module.input_quantizer, "pre_quant_scale", None)
        weights[f"{name}.weight"] = weight if scale is None else weight * scale.float().reshape(1, -1)
    return weights


def main(request: Request) -> None:
    import modelopt.torch.quantization as mtq
    import torch

    model = load_model(request)

    def forward_loop(calibrated: nn.Module) -> None:
        with torch.no_grad():
            for row in request.tokens:
                calibrated(row[None], use_cache=False)

    config = _config(request.method)
    is_calibrated = request.method != "rtn"
    model, numbers = measured(lambda: mtq.quantize(model, config, forward_loop if is_calibrated else None))
    own = versions("nvidia-modelopt", "torch", "transformers")
    if request.method in ROUNDS_ACTIVATIONS:
        write_result(request, numbers, {}, texts=evaluate(model, request), versions=own)
        return
    with torch.no_grad():
        weights = _effective(model)
    write_result(request, numbers, weights, versions=own)


if __name__ == "__main__":
    main(read_request())
