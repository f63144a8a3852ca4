"""`StreamedHFArtifact`: a checkpoint run by transformers, with the weights of one module in memory at a time."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qcompiler.artifacts import HFArtifact
from qcompiler.frontend import build_on_meta, convert_names, quiet_transformers, read_config, tied_names
from qcompiler.ir import Trimmer
from qcompiler.storage import WeightStore

__all__ = ["StreamedHFArtifact"]


class StreamedHFArtifact(HFArtifact):
    """As `HFArtifact`, for checkpoints that are too large for the memory.

    transformers builds the model, compressed-tensors gives its modules their packed form, and decompresses each as it
    runs; its tensors are read ahead of that and dropped behind. So each call reads all weights once.

    A module that reads the weights of another without calling it cannot be run so.

    Args:
        path: a directory with ``config.json``, which may declare a quantization of compressed-tensors, and safetensors.

    Raises:
        UnsupportedModelError, WeightError: as `HFArtifact`.
    """

    def _read_model(self, store: WeightStore) -> tuple[Any, list[str], frozenset[str]]:
        config = read_config(self.path)
        model, computed = build_on_meta(self.path, config, self._trust_remote_code)
        quantization = config.get("quantization_config")
        if quantization is not None:
            _pack(model, quantization)
        weights, unused = convert_names(store, model)
        missing = _Modules(weights).attach(model)
        for name, value in computed.items():
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = value
        return model, missing, frozenset(unused)


def _pack(model: Any, quantization: Mapping[str, Any]) -> None:
    """Gives modules the parameters that the checkpoint has of them, on meta."""
    from transformers.quantizers.auto import AutoHfQuantizer

    with quiet_transformers():
        quantizer = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        quantizer.validate_environment()
        quantizer.preprocess_model(model)
    quantizer.compressor.remove_decompression_hook(model)  # of the whole model, ahead of its first run


class _Modules:
    """Gives modules their weights while they run."""

    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights
        self._memory = Trimmer()
        self._kept: dict[nn.Module, tuple[dict[str, Any], dict[str, Any], Any]] = {}

    def attach(self, model: nn.Module) -> list[str]:
        """Hooks on every module with parameters of its own.

        Returns:
            Parameters that are stored under none of their names.
        """
        ties, missing = tied_names(model), []
        for path, module in model.named_modules():
            stored: dict[str, str] = {}
            for name, parameter in module._parameters.items():
                full = f"{path}.{name}" if path else name
                known = [tied for tied in (full, *ties.get(full, ())) if tied in self._weights]
                if parameter is not None and known:
                    stored[name] = known[0]
                elif parameter is not None:
                    missing.append(full)
            if stored:
                module.register_forward_pre_hook(lambda module, _, stored=stored: self._load(module, stored))
                module.register_forward_hook(lambda module, *_: self._drop(module), always_call=True)
        return missing

    def _load(self, module: nn.Module, stored: Mapping[str, str]) -> None:
        self._kept[module] = (
            dict(module._parameters),
            dict(module._buffers),
            getattr(module, "quantization_status", None),
        )
        for name, source in stored.items():
            tensor, declared = self._weights.read(source), module._parameters[name]
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and declared is not None:
                tensor = tensor.to(declared.dtype)  # scales too, as transformers does
            module._parameters[name] = _parameter(tensor)
        if hasattr(module, "quantization_scheme"):
            from compressed_tensors.compressors import decompress_module

            decompress_module(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                module._parameters[name] = _parameter(parameter.float())

    def _drop(self, module: nn.Module) -> None:
        parameters, buffers, status = self._kept.pop(module)
        for owned, before in ((module._parameters, parameters), (module._buffers, buffers)):
            owned.clear()
            owned.update(before)
        if status is not None:
            module.quantization_status = status
        self._memory.trim()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
