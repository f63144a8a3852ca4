"""GPTQModel: ``rtn``, ``gptq`` (its default order), ``gptq-static`` (act-order, static groups) and ``gptq-mse``."""

import os
from typing import Any

import torch
from protocol import Request, measured, read_request, versions, write_result
from torch import Tensor, nn

# On machines with two cores it asks itself for one worker thread, then refuses to start with fewer than two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def _config(method: str) -> Any:
    from gptqmodel.quantization import config as configs

    # The other format, gptq, differs in storing zero points less one. In it the model is left after quantization for
    # saving, while its kernels, which `_effective` asks for the weights, read zero points as they are.
    common: dict[str, Any] = {"bits": 4, "group_size": 128, "sym": True, "format": "gptq_v2"}
    common |= {"offload_to_disk": False, "device": "cpu"}
    match method:
        case "rtn":
            return configs.RTNConfig(**common)
        case "gptq":
            return configs.GPTQConfig(**common, damp_percent=0.01)
        case "gptq-static":
            return configs.GPTQConfig(
                **common, damp_percent=0.01, desc_act=True, static_groups=True, act_group_aware=False
            )
        case "gptq-mse":
            return configs.GPTQConfig(**common, damp_percent=0.01, mse=2.0)
    raise SystemExit(f"unknown method {method!r}")


def _effective(model: nn.Module) -> dict[str, Tensor]:
    """All weights that the quantized model computes with, unpacked."""
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if hasattr(module, "dequantize_weight") and hasattr(module, "qweight"):
            weights[f"{name}.weight"] = module.dequantize_weight().T
    return weights


def main(request: Request) -> None:
    from gptqmodel import GPTQModel, extension

    extension.load(name="pack_block_cpu")  # compiles on its first use on a machine, which is no part of quantizing
    config = _config(request.method)
    model = GPTQModel.load(request.model, config, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in request.tokens]
    options: dict[str, Any] = {} if request.method == "rtn" else {"calibration": rows, "calibration_sort": None}
    _, numbers = measured(lambda: model.quantize(batch_size=1, **options))
    with torch.no_grad():
        weights = _effective(model.model)
    write_result(request, numbers, weights, versions=versions("gptqmodel", "torch", "transformers"))


if __name__ == "__main__":
    main(read_request())
