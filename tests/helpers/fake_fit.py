"""Stands in for the command line in tests of the launcher: ``fake_fit.py fit ARGUMENTS`` writes a record and ends as ``--fake.ends``
says. ``main`` is what a job of a cluster calls."""

import json
import os
import sys
import time
from pathlib import Path

from ttt_lit.train.lock import RunLock


def main(arguments):
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    given = {name.removeprefix("--"): value for name, value in pairs}
    folder = Path(given["run.root"]) / Path(given["config"]).stem / given["run.id"]
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "record.json"
    if record.is_file() and json.loads(record.read_text())["status"] == "finished":
        return 0
    lock = RunLock(folder)
    lock.acquire()
    with (folder / "starts.jsonl").open("a") as starts:
        environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        line = {"time": time.time(), "pid": os.getpid(), "arguments": arguments, "environment": environment}
        starts.write(json.dumps(line) + "\n")
    try:
        return _end(given, record)
    finally:
        lock.release()


def _end(given, record):
    ends = given.get("fake.ends", "finished")
    print("training", flush=True)
    if ends == "late":  # broken the first time, well the second
        ends = "finished" if len((record.parent / "starts.jsonl").read_text().splitlines()) > 1 else "failed"
    if ends == "waits":
        _write(record, "running")
        while not (record.parent / "go").exists():
            time.sleep(0.02)
        ends = "finished"
    if ends == "refused":
        print("error: the data are not there", file=sys.stderr)
        return 1
    if ends == "finished with 1":  # killed while it put things away
        _write(record, "finished")
        return 1
    reason = None if ends == "finished" else f"it was told to be {ends}"
    _write(record, ends, reason)
    return 0 if ends == "finished" else 1


def _write(record, status, reason=None):
    plain = {"status": status, "reason": reason, "totals": {"gpu_seconds": {"compute": 7200.0}}}
    temporary = record.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(plain))
    os.replace(temporary, record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
