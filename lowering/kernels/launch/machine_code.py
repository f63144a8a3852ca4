"""Compiles Triton kernels ahead of time, for GPUs that are not there, and reads the machine code.

    python -m qcompiler.lowering.kernels.launch.machine_code MODULE... [--capability 80 90] [--match TEXT]

Each module has a function ``ahead_of_time() -> Iterable[KernelCase]``. Needs Triton, no GPU and no CUDA toolkit: the
wheel brings ``ptxas`` and ``cuobjdump``. It must run without ``TRITON_INTERPRET``, so tests start it as a process.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError, MissingDependencyError

__all__ = ["SHARED_MEMORY", "KernelCase", "MachineCode", "compile_case"]

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may use, by compute capability (CUDA C++ Programming Guide, table 21)."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel with one launch configuration, and what its machine code must look like.

    Attributes:
        name: unique within its module.
        kernel: the ``triton.jit`` function.
        types: of the arguments that are no constants: ``*fp16``, ``i32``, ...
        constants: the ``tl.constexpr`` arguments.
        options: ``num_warps``, ``num_stages``.
        mma: by compute capability, a tensor-core instruction that the code must hold: ``HMMA``, ``HGMMA`` (fp16, bf16),
            ``IMMA``, ``IGMMA`` (int8), ``QGMMA`` (fp8); None for a kernel that has no matrix product, and
            capabilities left out for those it cannot be compiled for.
        weights_per_iteration: elements that one pass through the hot loop dequantizes, in the whole block; 0 if
            nothing is counted.
        budget: instructions per such element and lane, at most.
        unaligned: pointer or integer arguments not known to be multiples of 16.
        flaw: says what is wrong with the PTX, in words; empty for nothing.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    mma: Mapping[int, str | None]
    weights_per_iteration: int = 0
    budget: float = 0.0
    unaligned: frozenset[str] = frozenset()
    flaw: Callable[[str], str] | None = None


@dataclass
class MachineCode:
    """What came out of the compiler.

    Attributes:
        name: of the case.
        capability: it was compiled for.
        registers: per thread.
        spilled_bytes: of local memory, per thread: room for registers that did not fit, or were indexed.
        shared_bytes: per block.
        opcodes: how often each opcode, without its modifiers, occurs.
        loop: the same of the hot loop: the innermost one with the most tensor-core instructions, or the longest.
        instructions_per_weight: of the hot loop, per element and lane; None if not asked for.
        failures: what is not as the case says, in words; empty is good.
    """

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    opcodes: dict[str, int]
    loop: dict[str, int]
    instructions_per_weight: float | None
    failures: list[str] = field(default_factory=list)


def compile_case(case: KernelCase, capability: int) -> MachineCode:
    """Compiles one case for ``sm_<capability>`` and holds the machine code against what the case expects.

    Raises:
        InputError: if the compiler refuses the kernel.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in case.constants and name not in case.unaligned and signature[name][0] in "*i"
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    try:
        with redirect_stdout(sys.stderr):  # Triton prints the assembly that ptxas refuses
            compiled = triton.compile(source, target=target, options=dict(case.options))
    except Exception as error:
        got = "\n".join(str(error).splitlines()[:8])
        raise InputError("the kernel does not compile", where=f"{case.name} for sm_{capability}", got=got) from error
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([dump, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = _instructions(sass)
    loop = _hot_loop(instructions)
    threads = 32 * int(case.options.get("num_warps", 4))
    per_weight = len(loop) * threads / case.weights_per_iteration if case.weights_per_iteration and loop else None
    code = MachineCode(
        case.name,
        capability,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        int(compiled.metadata.shared),
        dict(Counter(opcode for _, opcode, _ in instructions)),
        dict(Counter(opcode for _, opcode, _ in loop)),
        per_weight,
    )
    code.failures = list(_failures(case, code))
    if case.flaw is not None and (flaw := case.flaw(compiled.asm["ptx"])):
        code.failures.append(flaw)
    return code


def _failures(case: KernelCase, code: MachineCode) -> Iterator[str]:
    if code.spilled_bytes:
        yield f"{code.spilled_bytes} bytes of registers spilled"
    if code.shared_bytes > SHARED_MEMORY.get(code.capability, code.shared_bytes):
        yield f"{code.shared_bytes} bytes of shared memory, more than {SHARED_MEMORY[code.capability]}"
    wanted = case.mma.get(code.capability)
    if wanted is not None and not code.opcodes.get(wanted):
        yield f"no {wanted} instruction"
    if case.budget:
        if code.instructions_per_weight is None:
            yield "no loop was found to count instructions in"
        elif code.instructions_per_weight > case.budget:
            yield f"{code.instructions_per_weight:.2f} instructions per weight, more than {case.budget}"


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands) of every instruction, padding left out."""
    found = []
    for line in sass.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*([^;]*);", line)
        if match and match[2] != "NOP":
            found.append((int(match[1], 16), match[2], match[4]))
    return found


def _hot_loop(instructions: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    spans = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    bodies = [[i for i in instructions if start <= i[0] <= end] for start, end in inner]
    return max(bodies, key=lambda body: (sum("MMA" in opcode for _, opcode, _ in body), len(body)), default=[])


def _triton() -> Any:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InputError("Triton interprets kernels in this process", got="TRITON_INTERPRET", expected="it unset")
    try:
        import triton
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "compiling kernels needs Triton", got="no module triton", remedy="pip install 'qcompiler[kernels]'"
        ) from error
    return triton


def main(arguments: list[str] | None = None) -> int:
    """The command: one JSON object per case and capability; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--capability", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    given = parser.parse_args(arguments)
    _triton()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default from 3.10 on; before it, Triton warns
    failed = False
    for module in given.modules:
        for case in importlib.import_module(module).ahead_of_time():
            for capability in given.capability:
                if given.match in case.name and capability in case.mma:
                    try:
                        code = compile_case(case, capability)
                    except InputError as error:
                        code = MachineCode(case.name, capability, 0, 0, 0, {}, {}, None, [f"{error.what}: {error.got}"])
                    failed |= bool(code.failures)
                    print(json.dumps({"module": module, **asdict(code)}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
