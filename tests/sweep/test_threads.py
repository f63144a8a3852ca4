"""How many threads there are, on made-up machines."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qcompiler.sweep import threads
from qcompiler.sweep.threads import (
    contention,
    others_running,
    sensible_threads,
    usable_cores,
    use_threads,
)
from tests.tiny_checkpoint import command, save_checkpoint


def written(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def torch_threads(monkeypatch):
    """PyTorch's number of threads, without its threads."""
    held = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: held[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: held.__setitem__(0, number))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr(threads, "others_running", lambda: 3)
    return held


@pytest.mark.parametrize(
    ("cores", "others", "expected"),
    [(1, 0, 1), (1, 5, 1), (2, 0, 2), (2, 1, 1), (2, 9, 1), (3, 9, 2), (8, 1, 7), (8, 64, 4)],
)
def test_free_cores_but_half_at_least(cores, others, expected):
    assert sensible_threads(cores, others) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "350000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),  # of a group above
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/../x", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),  # a container's view
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/c",
                "sys/fs/cgroup/cpu,cpuacct/docker/c/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/docker/c/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/c",  # not seen from inside: the top is the container's
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            6,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            16,
        ),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "200000 0"}, 16),
        ({"proc/self/cgroup": "nonsense", "sys/fs/cgroup/cpu.max": ""}, 16),
    ],
)
def test_quotas_of_control_groups(tmp_path, files, expected):
    assert usable_cores(written(tmp_path, files), affinity=16) == expected


def test_affinity_counts_where_it_is_less(tmp_path):
    assert usable_cores(tmp_path, affinity=3) == 3
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_running_tasks_but_this_one(tmp_path):
    assert others_running(tmp_path) == 0
    assert others_running(written(tmp_path, {"proc/loadavg": "9.20 0.18 0.12 4/80 11206"})) == 3
    assert others_running(written(tmp_path, {"proc/loadavg": "unknown"})) == 0


def test_what_the_user_said_counts(torch_threads, monkeypatch):
    assert use_threads() == 5
    assert use_threads(7) == 7
    torch_threads[0] = 2
    assert use_threads() == 2, "somebody had called torch.set_num_threads"
    torch_threads[0] = 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert use_threads() == 8


def test_contention_is_told_only_where_every_look_shows_it(torch_threads):
    slow = iter([9.0, 4.1, 5.0, 6.0, 7.0])
    found = contention(lambda count: 2.0 if count == 1 else next(slow))
    assert found is not None
    assert found.startswith("8 threads")
    assert "2.0 times" in found or "2.1 times" in found
    assert "--threads 1" in found
    once = iter([9.0, 1.0, 5.0, 6.0, 7.0])
    assert contention(lambda count: 2.0 if count == 1 else next(once)) is None
    torch_threads[0] = 1
    assert contention(lambda count: pytest.fail("nothing to measure")) is None


def test_the_trial_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    assert threads._seconds_of_trial(before + 1) > 0
    assert torch.get_num_threads() == before


def test_the_commands_take_a_number_and_the_report_tells_it(torch_threads, tmp_path):
    model = save_checkpoint(tmp_path / "model", layers=1)
    done = command("compile", model, "-o", tmp_path / "out", "-r", "w8a16", "--threads", 3)
    assert done.status == 0
    assert json.loads((tmp_path / "out/native/report.json").read_text())["machine"]["threads"] == "3"
    assert command("generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", 1, "--threads", 2).status == 0
    assert torch_threads == [2]
    assert command("evaluate", model, "--threads", 0).status == 2


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["compile"], {}, "passive"),
        (["generate", "OUT"], {}, None),
        (["compile"], {"OMP_WAIT_POLICY": "active"}, "active"),
        (["compile"], {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_the_command_settles_how_threads_wait_before_torch_is_loaded(arguments, given, expected):
    program = (
        "import os, sys, types\n"
        "from qcompiler import cli\n"
        "assert 'torch' not in sys.modules and 'OMP_WAIT_POLICY' not in {*os.environ} - {*sys.argv[1].split()}\n"
        "run = sys.modules['qcompiler.cli.run'] = types.ModuleType('qcompiler.cli.run')\n"
        "run.main = lambda arguments: print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.argv[1:] = sys.argv[2:]\n"
        "cli.main()\n"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {key: value for key, value in os.environ.items() if key not in names} | given
    command = [sys.executable, "-c", program, " ".join(given), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)
