"""`Trimmer` gives back what glibc holds on to."""

import subprocess
import sys

import pytest

_SCRIPT = """
import os, resource, torch
from qcompiler.sweep.memory import Trimmer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def make_holes():
    keep, drop = [], []
    for _ in range(64):
        drop.append(torch.ones(1 << 19))
        keep.append(torch.ones(1 << 14))
    return keep  # the small blocks in between pin the heap's end

torch.ones(4 << 20)  # once freed, blocks up to this size come from the heap
trimmer = Trimmer(slack=16 << 20)
keep = make_holes()
before = resident()
trimmer.trim()
print(before - resident())
before = resident()
trimmer.trim()  # nothing has grown
print(before - resident())
keep += make_holes()
before = resident()
trimmer.trim()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_holes_between_live_blocks_are_given_back() -> None:
    output = subprocess.run([sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, check=True, text=True).stdout
    first, idle, second = map(int, output.split())
    assert min(first, second) > 16 << 20  # of 128 MiB freed; how much lies in holes varies
    assert idle < 1 << 20
