"""The lock of a run's folder: one process at a time, and none after it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ttt_lit.train.lock import RunLock, holder

ROOT = Path(__file__).resolve().parents[2]


def test_a_lock_is_exclusive_names_its_holder_and_ends_with_it(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert holder(tmp_path) is None
    first.acquire()
    assert f"process {os.getpid()} on " in holder(tmp_path)
    with pytest.raises(RuntimeError, match=rf"is being trained by process {os.getpid()} on .*stop it first"):
        second.acquire()
    first.release()
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    second.acquire()
    second.release()


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = f"import os; from ttt_lit.train.lock import RunLock; RunLock({str(tmp_path)!r}).acquire(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (tmp_path / "run.lock").exists()
    assert holder(tmp_path) is None
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
