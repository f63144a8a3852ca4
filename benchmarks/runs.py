"""What `quality` and `peers` do alike: the models they measure, and keeping every run as it ends."""

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["environment", "keep", "models", "peak_mb"]


def models(model: Path, planted: float | None, scratch: Path) -> dict[str, Path]:
    """Title → directory: the model, and where a factor is given, the same with outliers planted (`benchmarks.plant`).

    Args:
        model: a Hugging Face directory.
        planted: by how much a few channels are raised; a power of two leaves what the model computes as it is.
        scratch: an existing directory for the second model.
    """
    found = {model.name: model}
    if planted is not None:
        from benchmarks.plant import plant_directory

        out = scratch / f"{model.name}-planted"
        if not plant_directory(model, out, factor=planted):
            raise SystemExit(f"--planted: {model} has no norm that a scale can be folded through")
        found[f"{model.name}, outliers ×{planted:g}"] = out
    return found


def environment(threads: int) -> dict[str, str]:
    """What a measured process is given besides its inherited environment. Threads that wait sleep."""
    return {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def keep(path: Path, document: dict[str, Any] | list[Any]) -> None:
    """Writes JSON beside the file, then renames it: an interruption leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes); NaN where there is no /proc.

    Not ru_maxrss: that one starts from what the process that started this one held.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), math.nan)
