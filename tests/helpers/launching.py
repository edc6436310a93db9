"""Starts runs with the launcher on this machine and reads what became of them. ``fit`` is ``fake_fit.py`` here."""

import json
import os
import sys
from pathlib import Path

from rich.console import Console

from ttt_lit.launch.command import run_to_end
from ttt_lit.launch.local import LocalBackend
from ttt_lit.launch.loop import launch

FAKE = Path(__file__).with_name("fake_fit.py")
ROOT = Path(__file__).resolve().parents[2]


def environment():
    return dict(os.environ) | {"PYTHONPATH": str(ROOT)}


def local(jobs=1, **settings):
    return LocalBackend((sys.executable, str(FAKE)), [environment() for _ in range(jobs)], **settings)


def run_all(runs, jobs=1):
    return launch(runs, local(jobs), lambda board: None, slots=jobs, poll_seconds=0.01)


def to_end(runs, backend, slots=1):
    """Exit status of the command, without a terminal."""
    console = Console(force_terminal=False)
    return run_to_end("m", runs, backend, slots=slots, console=console, poll_seconds=0.01)


def starts(run):
    path = run.folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ends(how, *arms, **others):
    return {"arms": list(arms), "set": {"fake.ends": how}, **others}


def start_of(tmp_path, run):
    return {"model.start.init_from": str(tmp_path / "runs" / run / "checkpoints" / "C")}
