"""Where to compute, by name."""

import torch

from qcompiler.errors import InputError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device of a name such as ``cpu``, ``cuda:1`` or ``auto``.

    Raises:
        InputError: for an unknown one, or one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("unknown device", got=name, expected="cpu, cuda, cuda:1, ... or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError("nothing here runs on such a device", got=name, expected="cpu, cuda, cuda:1, ... or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", got=name, expected="cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        most = torch.cuda.device_count() - 1
        raise InputError("no such CUDA device", got=name, expected=f"cuda:0 to cuda:{most}" if most else "cuda:0")
    return device
