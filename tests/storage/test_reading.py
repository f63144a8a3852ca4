"""Files, pipes, and what cannot be read."""

import os
import subprocess
from pathlib import Path

import pytest

from qcompiler.storage.reading import read_named


def test_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert read_named(tmp_path / "a") == b"x" * 100_000


def test_a_pipe_that_something_writes_to_is_read_to_its_end(tmp_path):
    script = "sleep 0.2; head -c 200000 /dev/zero"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert len(read_named(Path(f"/dev/fd/{process.stdout.fileno()}"))) == 200_000


@pytest.mark.timeout(20)
def test_a_pipe_that_nothing_writes_to_is_empty(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert read_named(tmp_path / "pipe") == b""


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "no-such", tmp_path / "loop"):
        with pytest.raises(OSError, match=r"directory|No such|levels"):
            read_named(path)


def test_a_device_is_no_file():
    with pytest.raises(OSError, match="a device"):
        read_named(Path("/dev/zero"))
