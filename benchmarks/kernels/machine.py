"""The machine and the versions a result belongs to."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata

import torch

from qcompiler.reporting import machine

__all__ = ["describe"]

_PACKAGES = ("triton", "transformers", "safetensors", "numpy")


def describe(device: torch.device) -> dict[str, str]:
    """Device, driver, and versions."""
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["L2"] = f"{properties.L2_cache_size / 2**20:.0f} MiB"
        found["driver"] = _driver()
        found["CUDA of torch"] = str(torch.version.cuda)
    else:
        found["device"] = "CPU"
        found |= {key: value for key, value in machine().items() if key not in ("torch", "python")}
    found["python"] = platform.python_version()
    found["torch"] = torch.__version__
    return found | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"
