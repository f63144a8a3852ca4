"""Runs the inspection of machine code, which needs a process that does not interpret kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]


def inspect(module: str, match: str = "", *, capabilities: tuple[int, ...] = (80, 90)) -> list[dict[str, Any]]:
    """The reports of all cases of a module of ``qcompiler.lowering.kernels`` whose name holds a text.

    Args:
        module: its place there, such as ``rows.triton_gated``.
        match: what names of cases hold.
        capabilities: compiled for; each takes as long again.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "qcompiler.lowering.kernels.launch.machine_code",
        f"qcompiler.lowering.kernels.{module}",
    ]
    ran = subprocess.run(
        [*command, "--match", match, "--capability", *map(str, capabilities)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert ran.stdout, ran.stderr
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (ran.returncode == 0) == (not any(report["failures"] for report in reports)), ran.stderr
    return reports
