"""Compiles kernels the way launches have them compiled, in a process of its own that does not interpret kernels.

The cases of `machine_code` say themselves what Triton knows of each argument. A launch finds that out from the values:
an integer that is 1 becomes a constant, one that 16 divides is known to be such, and so is the address of a tensor.

    python -m tests.lowering.kernels.launch.as_launched MODULE FUNCTION CAPABILITY
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[4]
_FEW_BYTES = 32


def as_launched(module: str, function: str = "launches", capability: int = 90) -> list[dict[str, Any]]:
    """What a function of a test module launches on tensors of the CPU: the kernel, and what became of it.

    Args:
        module: its place below ``tests.lowering.kernels``, such as ``rows.test_triton_gated``.
        function: takes the capability and calls launchers.
        capability: of the device that is compiled for.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.lowering.kernels.launch.as_launched", module, function, str(capability)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def flaws(found: list[dict[str, Any]], capability: int = 90) -> list[str]:
    """Kernels that spill more than a few addresses, take too much shared memory, or are laid out wrongly."""
    from qcompiler.lowering.kernels.launch.machine_code import SHARED_MEMORY

    return [
        f"{one['kernel']} {one['integers']}: {one}"
        for one in found
        if one["spilled"] > _FEW_BYTES or one["flaw"] or one["shared"] > SHARED_MEMORY[capability]
    ]


class _Driver:
    """A GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Its index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing runs on it."""
        return 0


def compile_all(module: str, function: str, capability: int) -> None:
    """Runs the function; each launch is compiled, described in a line of JSON, and not run."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver(capability))
    run, seen = JITFunction.run, set()
    on_device = {"INLINE": True, "PTX": True, "NATIVE": capability >= 89}

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        assert all(count <= 65535 for count in grid[1:]), grid
        named |= {name: value for name, value in on_device.items() if name in named}
        kernel = run(self, *arguments, grid=grid, warmup=True, **named)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            integers = [argument for argument in arguments if isinstance(argument, int)]
            print(json.dumps({"kernel": self.__name__, "integers": integers, **_described(kernel)}), flush=True)
        return kernel

    JITFunction.run = compiled
    getattr(importlib.import_module(f"tests.lowering.kernels.{module}"), function)(capability)


def _described(kernel: Any) -> dict[str, Any]:
    import triton

    from qcompiler.lowering.kernels.codebook_linear.triton_lookup import rows_are_apart

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    spilled = sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))
    flaw = rows_are_apart(ptx) if "one table:" in ptx else ""
    return {"spilled": spilled, "shared": int(kernel.metadata.shared), "flaw": flaw, "fused": "fma.rn.f32" in ptx}


if __name__ == "__main__":
    compile_all(sys.argv[1], sys.argv[2], int(sys.argv[3]))
