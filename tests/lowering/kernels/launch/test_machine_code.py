"""Ahead-of-time inspection of kernels: what it reads off machine code, and that it fails what it should fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import InputError
from qcompiler.lowering.kernels.launch import machine_code
from qcompiler.lowering.kernels.launch.machine_code import KernelCase, compile_case

ROOT = Path(__file__).resolve().parents[4]

TOY = """
import triton
import triton.language as tl
from qcompiler.lowering.kernels.launch.machine_code import KernelCase

@triton.jit
def product(x, w, y, steps, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(steps):
        rows = tl.load(x + m[:, None] * 4096 + step * BK + k[None, :])
        columns = tl.load(w + (step * BK + k[:, None]) * 4096 + n[None, :])
        acc = tl.dot(rows, columns, acc)
    tl.store(y + m[:, None] * BN + n[None, :], acc.to(tl.float16))

@triton.jit
def double(x, y, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at) * 2)

TYPES = {"x": "*fp16", "w": "*fp16", "y": "*fp16", "steps": "i32"}
TILE = {"BM": 16, "BN": 128, "BK": 64}

def case(name, mma, options=(), constants=TILE, weights=64 * 128, budget=3.0):
    options = {"num_warps": 4, "num_stages": 3, **dict(options)}
    return KernelCase(name, product, TYPES, constants, options, mma, weights, budget)

def ahead_of_time():
    yield case("good", {80: "HMMA", 90: "HMMA"})
    yield case("wide", {90: "HGMMA"}, constants={"BM": 64, "BN": 128, "BK": 64})
    yield case("over budget", {90: "HMMA"}, budget=0.01)
    yield case("other instruction", {90: "HGMMA"})
    yield case("spilling", {80: "HMMA"}, {"maxnreg": 64}, {"BM": 64, "BN": 128, "BK": 64}, budget=100.0)
    yield case("refused", {90: "HGMMA"}, {"maxnreg": 32}, {"BM": 64, "BN": 128, "BK": 64})
    yield case("too much memory", {80: "HMMA"}, {"num_stages": 12}, {"BM": 64, "BN": 128, "BK": 64}, budget=100.0)
    yield KernelCase("no product", double, {"x": "*fp16", "y": "*fp16"}, {"B": 1024}, {"num_warps": 4}, {90: None})
    yield KernelCase("no loop", double, {"x": "*fp16", "y": "*fp16"}, {"B": 1024}, {}, {90: None}, 1024, 9.0)
"""


def run(folder: Path, *arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which sees the toy module."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "qcompiler.lowering.kernels.launch.machine_code", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_kernels.py").write_text(TOY)
    return folder


@pytest.fixture(scope="module")
def report(toy: Path) -> dict[tuple[str, int], dict[str, Any]]:
    pytest.importorskip("triton")
    process = run(toy, "toy_kernels")
    assert process.returncode == 1, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert {line["module"] for line in lines} == {"toy_kernels"}
    return {(line["name"], line["capability"]): line for line in lines}


def test_each_case_is_compiled_for_each_capability_it_names(report):
    assert len(report) == 10
    assert [key for key in report if key[0] == "good"] == [("good", 80), ("good", 90)]


def test_what_is_as_expected_has_no_failures(report):
    good = [report["good", 80], report["good", 90], report["wide", 90], report["no product", 90]]
    assert [line["failures"] for line in good] == [[], [], [], []]


def test_instructions_of_the_hot_loop_are_counted(report):
    for capability in (80, 90):
        line = report["good", capability]
        # 16 x 128 x 64 are 64 products of 16 x 8 x 16 for 4 warps
        assert line["loop"]["HMMA"] == 16
        assert "STG" not in line["loop"]
        assert line["opcodes"]["STG"] > 0
        assert 0.1 < line["instructions_per_weight"] < 3.0
        assert line["instructions_per_weight"] == sum(line["loop"].values()) * 128 / (64 * 128)
        assert 0 < line["registers"] <= 255
        assert line["shared_bytes"] >= 2 * (16 + 128) * 64 * 2  # two of the stages at least
        assert line["spilled_bytes"] == 0


def test_failures_say_what_is_wrong(report):
    (text,) = report["over budget", 90]["failures"]
    assert text.endswith("instructions per weight, more than 0.01")
    assert report["other instruction", 90]["failures"] == ["no HGMMA instruction"]
    assert report["spilling", 80]["spilled_bytes"] > 0
    assert report["spilling", 80]["failures"][0].endswith("bytes of registers spilled")
    assert report["too much memory", 80]["failures"] == [
        f"{report['too much memory', 80]['shared_bytes']} bytes of shared memory, more than 166912"
    ]
    assert report["no loop", 90]["failures"] == ["no loop was found to count instructions in"]


def test_only_matching_cases_are_compiled(toy):
    pytest.importorskip("triton")
    process = run(toy, "toy_kernels", "--match", "no prod", "--capability", "80", "90")
    assert process.returncode == 0, process.stderr
    assert [json.loads(line)["name"] for line in process.stdout.splitlines()] == ["no product"]


def test_a_process_that_interprets_kernels_cannot_compile_them(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="interprets"):
        compile_case(KernelCase("any", None, {}, {}, {}, {90: None}), 90)


def test_the_command_says_so_too(toy):
    process = run(toy, "toy_kernels", interpret="1")
    assert process.returncode == 1
    assert process.stdout == ""
    assert "Triton interprets kernels in this process" in process.stderr


def test_a_kernel_the_compiler_refuses_fails_without_ending_the_report(report):
    (text,) = report["refused", 90]["failures"]
    assert text.startswith("the kernel does not compile")
    assert "Insufficient registers" in text


def test_the_hot_loop_is_the_innermost_with_most_products():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   LDG.E R4, [R2.64] ;
        /*0030*/              @P0 BRA 0x20 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/                   NOP ;
        /*0060*/             @!P1 BRA 0x40 ;
        /*0070*/              @P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
    """
    loop = machine_code._hot_loop(machine_code._instructions(listing))
    assert [opcode for _, opcode, _ in loop] == ["HMMA", "BRA"]
