"""The launcher on this machine: order, isolation of failures, resume, runs of other processes."""

import json
import os
import signal
import time

from helpers.launching import ends, local, run_all, start_of, starts

from ttt_lit.launch.loop import Board, launch
from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.train.lock import RunLock, holder


def test_parents_run_before_children_and_a_failure_stops_its_children_only(tmp_path, runs_of):
    runs = runs_of(
        {"arms": ["q_a"], "set": start_of(tmp_path, "q_base/m")},
        ends("refused", "q_b"),
        {"arms": ["q_c"], "set": start_of(tmp_path, "q_b/m")},
        {"arms": ["q_base"]},
        ends("diverged", "q_base", seeds=[1]),
    )
    board = run_all(runs, jobs=2)
    states = {"q_a/m": "finished", "q_b/m": "failed", "q_c/m": "blocked", "q_base/m": "finished"}
    assert board.states == states | {"q_base/m-s1": "diverged"}
    reasons = {"q_b/m": "the data are not there", "q_c/m": "needs q_b/m", "q_base/m-s1": "it was told to be diverged"}
    assert board.reasons == reasons
    child, refused, blocked, parent, _ = runs
    assert starts(child)[0]["time"] > (parent.folder / "record.json").stat().st_mtime - 0.1
    assert "training" in (refused.folder / "log.txt").read_text()
    assert starts(blocked) == []


def test_a_second_start_goes_on_where_it_is_worth_it(runs_of):
    """Finished runs are skipped and diverged ones left alone; a failed one gets the same command again."""
    runs = runs_of({"arms": ["q_a"]}, ends("late", "q_b"), ends("diverged", "q_c"))
    assert run_all(runs).states == {"q_a/m": "finished", "q_b/m": "failed", "q_c/m": "diverged"}
    again = run_all(runs)
    assert again.states == {"q_a/m": "finished", "q_b/m": "finished", "q_c/m": "diverged"}
    assert [len(starts(run)) for run in runs] == [1, 2, 1]
    first, second = starts(runs[1])
    assert first["arguments"] == second["arguments"]


def test_a_run_whose_record_is_finished_is_so_however_its_process_ended(runs_of):
    assert run_all(runs_of(ends("finished with 1", "q_a"))).is_finished


def test_a_run_whose_process_is_gone_is_continued(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    run.folder.mkdir(parents=True)
    (run.folder / "record.json").write_text('{"status": "running", "reason": null}')
    assert run_all([run]).is_finished
    assert len(starts(run)) == 1


def test_a_run_that_another_process_trains_is_waited_for_and_not_started(runs_of):
    """An earlier launcher's, which was killed; the later one knows nothing of it but its folder."""
    (run,) = runs_of(ends("waits", "q_a"))
    earlier, seen = local(), []
    earlier.start(run, run.arguments)
    while holder(run.folder) is None:
        time.sleep(0.01)

    def view(board):
        seen.append(board.states[run.name])
        (run.folder / "go").touch()

    assert launch([run], local(), view, slots=1, poll_seconds=0.01).is_finished
    assert seen[0] == "running"
    assert len(starts(run)) == 1
    earlier.stop()


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
    (broken.folder / "record.json").write_text("[]")
    board = run_all(runs)
    assert board.states == {broken.name: "failed", well.name: "finished"}
    assert "record.json: got list, expected an object" in board.reasons[broken.name]


def test_a_record_that_breaks_while_a_run_trains_fails_that_run_alone(runs_of):
    broken, well = runs = runs_of(ends("waits", "q_a"), ends("waits", "q_b"))

    def view(board):
        if all((run.folder / "record.json").exists() for run in runs) and not (well.folder / "go").exists():
            os.kill(starts(broken)[0]["pid"], signal.SIGKILL)
            (broken.folder / "record.json").write_text("{")
            (well.folder / "go").touch()

    board = launch(runs, local(2), view, slots=2, poll_seconds=0.01)
    assert board.states == {broken.name: "failed", well.name: "finished"}
    assert "record.json: not JSON" in board.reasons[broken.name]


def test_a_run_that_was_killed_says_so_although_its_record_does_not(runs_of):
    (run,) = runs_of(ends("waits", "q_a"))

    def view(board):
        if (run.folder / "record.json").exists() and board.states[run.name] == "running":
            os.kill(starts(run)[0]["pid"], signal.SIGKILL)

    board = launch([run], local(), view, slots=1, poll_seconds=0.01)
    assert board.reasons == {run.name: "exit status -9, and the record still says running: training"}


# Which run may start, and which never will ------------------------------------------------------------------------------------------


def planned(name, *after):
    return PlannedRun(experiment="q", run_id=name, root="runs", arguments=(), after=tuple(f"q/{one}" for one in after))


def test_only_children_of_broken_runs_are_blocked():
    runs = [planned("c", "b"), planned("b", "a"), planned("a"), planned("d", "e"), planned("e")]
    for broken in ("failed", "diverged", "interrupted"):
        states = {"q/a": broken, "q/b": "waiting", "q/c": "waiting", "q/d": "waiting", "q/e": "running"}
        board = Board(runs, dict(states))
        board.block()
        assert board.states == states | {"q/b": "blocked", "q/c": "blocked"}
        assert board.reasons == {"q/b": "needs q/a", "q/c": "needs q/b"}


def test_runs_start_in_order_when_there_is_room_and_their_parents_are_finished():
    runs = [planned("child", "parent"), planned("parent"), planned("x"), planned("y")]
    states = dict.fromkeys([run.name for run in runs], "waiting")

    def ready(slots, **changes):
        board = Board(runs, states | {f"q/{name}": state for name, state in changes.items()})
        return [run.run_id for run in board.ready(slots)]

    assert ready(None) == ["parent", "x", "y"]
    assert ready(2, x="running") == ["parent"]
    assert ready(2, parent="finished", x="queued") == ["child"]
    assert ready(1, x="running") == []
