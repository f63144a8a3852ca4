"""`Trimmer` gives back what glibc holds on to."""

import subprocess
import sys

import pytest

_SCRIPT = """
import os, resource, torch
from qcompiler.ir.memory import Trimmer

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def make_holes(size):
    keep, drop = [], []
    for _ in range(32):
        drop.append(torch.ones(size // 4))
        keep.append(torch.ones(size // 4))
    return keep  # as large as what is dropped: none fits into an older, smaller hole, and each pins its neighbour

torch.ones(4 << 20)  # once freed, blocks up to this size come from the heap
trimmer = Trimmer(slack=16 << 20)
keep = make_holes(2 << 20)
before = resident()
trimmer.trim()
print(before - resident())
before = resident()
trimmer.trim()  # nothing has grown
print(before - resident())
keep += make_holes(3 << 20)
before = resident()
trimmer.trim()
print(before - resident())
keep += make_holes(7 << 19)
for reused in (256 << 20, 0):
    before = resident()
    trimmer.trim(reused)
    print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_the_holes_between_live_blocks_are_given_back() -> None:
    output = subprocess.run([sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, check=True, text=True).stdout
    first, idle, second, *reused = map(int, output.split())
    assert first > 32 << 20  # of 64 MiB in holes
    assert second > 48 << 20  # of 96 MiB
    assert idle < 1 << 20
    assert max(reused) < 1 << 20  # what is taken again at once is left, then and later
