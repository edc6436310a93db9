"""The launcher on this machine: order, isolation of failures, resume, runs of other processes."""

import json
import os
import signal
import subprocess
import sys
import time

from helpers.launching import FAKE, ends, environment, local, run_all, start_of, starts

from ttt_lit.launch.loop import launch
from ttt_lit.train.lock import RunLock, holder


def test_parents_run_before_children_whatever_the_file_says(tmp_path, runs_of):
    runs = runs_of({"arms": ["q_a"], "set": start_of(tmp_path, "q_b/m")}, {"arms": ["q_b"]}, {"arms": ["q_c"]})
    board = run_all(runs, jobs=2)
    assert board.is_finished
    child, parent, _ = runs
    assert starts(child)[0]["time"] > (parent.folder / "record.json").stat().st_mtime - 0.1
    assert starts(child)[0]["time"] > starts(parent)[0]["time"]
    assert [len(starts(run)) for run in runs] == [1, 1, 1]


def test_a_failure_stops_its_children_only(tmp_path, runs_of):
    child = {"arms": ["q_a"], "set": start_of(tmp_path, "q_b/m")}
    runs = runs_of(ends("refused", "q_b"), child, ends("diverged", "q_base"), {"arms": ["q_c"]})
    board = run_all(runs)
    assert board.states == {"q_b/m": "failed", "q_a/m": "blocked", "q_base/m": "diverged", "q_c/m": "finished"}
    assert board.reasons == {
        "q_b/m": "the data are not there",
        "q_a/m": "needs q_b/m",
        "q_base/m": "it was told to be diverged",
    }
    assert "training" in (runs[0].folder / "log.txt").read_text()
    assert starts(runs[1]) == []


def test_a_second_start_goes_on_where_it_is_worth_it(runs_of):
    """Finished runs are skipped and diverged ones left alone; a failed one gets the same command again."""
    runs = runs_of({"arms": ["q_a"]}, ends("late", "q_b"), ends("diverged", "q_c"))
    assert run_all(runs).states == {"q_a/m": "finished", "q_b/m": "failed", "q_c/m": "diverged"}
    again = run_all(runs)
    assert again.states == {"q_a/m": "finished", "q_b/m": "finished", "q_c/m": "diverged"}
    assert [len(starts(run)) for run in runs] == [1, 2, 1]
    first, second = starts(runs[1])
    assert first["arguments"] == second["arguments"]


def test_a_run_whose_record_is_finished_is_so_however_its_process_ended(tmp_path, runs_of):
    runs = runs_of(ends("finished with 1", "q_a"), {"arms": ["q_b"], "set": start_of(tmp_path, "q_a/m")})
    assert run_all(runs).is_finished


def test_a_run_whose_process_is_gone_is_continued(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    run.folder.mkdir(parents=True)
    (run.folder / "record.json").write_text(json.dumps({"status": "running", "reason": None}))
    assert run_all([run]).is_finished
    assert len(starts(run)) == 1


def test_a_run_that_another_process_trains_is_waited_for_and_not_started(tmp_path, runs_of):
    (run,) = runs_of(ends("waits", "q_a"))
    process = subprocess.Popen([sys.executable, str(FAKE), "fit", *run.arguments], env=environment())
    try:
        while holder(run.folder) is None:
            time.sleep(0.01)
        seen = []

        def view(board):
            seen.append(board.states[run.name])
            (run.folder / "go").touch()

        board = launch([run], local(), view, slots=1, poll_seconds=0.01)
        assert seen[0] == "running"
        assert board.is_finished
        assert [one["pid"] for one in starts(run)] == [process.pid]
    finally:
        process.kill()
        process.wait()


def test_a_refused_second_process_does_not_make_the_run_a_failure(runs_of):
    """Two launchers start a run at the same moment: the one that loses watches the one that won."""
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    backend = local()
    begin = backend.start

    def start(run, arguments):
        lock.acquire()
        begin(run, arguments)

    backend.start = start
    seen = []

    def view(board):
        seen.append(board.states[run.name])
        if run.name in backend._others and "is being trained by" in (run.folder / "log.txt").read_text():
            (run.folder / "record.json").write_text(json.dumps({"status": "finished", "reason": None}))
            lock.release()

    board = launch([run], backend, view, slots=1, poll_seconds=0.05)
    assert set(seen) == {"running", "finished"}
    assert board.is_finished
    assert starts(run) == []


def test_a_run_whose_files_cannot_be_read_fails_alone(runs_of):
    broken, well = runs = runs_of({"arms": ["q_a"]}, {"arms": ["q_b"]})
    broken.folder.mkdir(parents=True)
    for content, message in (("{", "record.json: not JSON"), ("[]", "record.json: got list, expected an object")):
        (broken.folder / "record.json").write_text(content)
        board = run_all(runs)
        assert board.states == {broken.name: "failed", well.name: "finished"}
        assert message in board.reasons[broken.name]


def test_a_record_that_breaks_while_a_run_trains_fails_that_run_alone(runs_of):
    broken, well = runs = runs_of(ends("waits", "q_a"), ends("waits", "q_b"))

    def view(board):
        if all((run.folder / "record.json").exists() for run in runs) and not (well.folder / "go").exists():
            os.kill(starts(broken)[0]["pid"], signal.SIGKILL)
            (broken.folder / "record.json").write_text("{")
            (well.folder / "go").touch()

    board = launch(runs, local(2), view, slots=2, poll_seconds=0.01)
    assert board.states == {broken.name: "failed", well.name: "finished"}
    assert "not JSON" in board.reasons[broken.name]


def test_a_run_that_was_killed_says_so_although_its_record_does_not(runs_of):
    (run,) = runs_of(ends("waits", "q_a"))

    def view(board):
        if (run.folder / "record.json").exists() and board.states[run.name] == "running":
            os.kill(starts(run)[0]["pid"], signal.SIGKILL)

    board = launch([run], local(), view, slots=1, poll_seconds=0.01)
    assert board.reasons == {run.name: "exit status -9, and the record still says running: training"}
