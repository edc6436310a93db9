"""The launcher: order, isolation of failures, resume, locks, budgets from a baseline, Ctrl-C. ``fit`` is a tiny script here."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from ttt_lit.experiment.launch import command, slurm
from ttt_lit.experiment.launch.check import errors_in_a_process
from ttt_lit.experiment.launch.folder import NotFinished, matched_budget
from ttt_lit.experiment.launch.local import LocalBackend, environments_for
from ttt_lit.experiment.launch.loop import Board, launch
from ttt_lit.experiment.launch.outlook import seconds_left
from ttt_lit.experiment.launch.progress import Progress
from ttt_lit.experiment.launch.schedule import ready, with_blocked
from ttt_lit.experiment.launch.slurm_job import FitJob
from ttt_lit.experiment.launch.table import Lines, row
from ttt_lit.experiment.matrix import PlannedRun, expand
from ttt_lit.experiment.matrix_file import SlurmSettings, parse_matrix
from ttt_lit.train.lock import RunLock, holder

FAKE = Path(__file__).with_name("fake_fit.py")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs_of(tmp_path):
    """Entries of a matrix → its runs, with arms q_base, q_a, q_b, q_c below a folder of this test."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("run: {root: runs}\n")
    for arm in ("q_base", "q_a", "q_b", "q_c"):
        (tmp_path / "configs" / f"{arm}.yaml").write_text(f"run: {{experiment: {arm}}}\n")

    def make(*entries):
        matrix = parse_matrix({"name": "m", "runs": list(entries)}, "m.yaml")
        return expand(matrix, configs=tmp_path / "configs", root=str(tmp_path / "runs"))

    return make


def environment():
    return dict(os.environ) | {"PYTHONPATH": str(ROOT)}


def local(jobs=1, **settings):
    return LocalBackend((sys.executable, str(FAKE)), [environment() for _ in range(jobs)], **settings)


def run_all(runs, jobs=1):
    return launch(runs, local(jobs), lambda board: None, slots=jobs, poll_seconds=0.01)


def starts(run):
    path = run.folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ends(how, *arms, **others):
    return {"arms": list(arms), "set": {"fake.ends": how}, **others}


def start_of(tmp_path, run):
    return {"model.start.init_from": str(tmp_path / "runs" / run / "checkpoints" / "C")}


# Which run may start ------------------------------------------------------------------------------------------------------------


def planned(name, *after):
    return PlannedRun(experiment="q", run_id=name, root="runs", arguments=(), after=tuple(f"q/{one}" for one in after))


def test_only_children_of_broken_runs_are_blocked():
    runs = [planned("c", "b"), planned("b", "a"), planned("a"), planned("d", "e"), planned("e")]
    for broken in ("failed", "diverged", "interrupted"):
        states = {"q/a": broken, "q/b": "waiting", "q/c": "waiting", "q/d": "waiting", "q/e": "running"}
        assert with_blocked(runs, states) == states | {"q/b": "blocked", "q/c": "blocked"}


def test_runs_start_in_order_when_there_is_room_and_their_parents_are_finished():
    runs = [planned("child", "parent"), planned("parent"), planned("x"), planned("y")]
    states = dict.fromkeys([run.name for run in runs], "waiting")
    assert [run.run_id for run in ready(runs, states, None)] == ["parent", "x", "y"]
    assert [run.run_id for run in ready(runs, states | {"q/x": "running"}, 2)] == ["parent"]
    assert [run.run_id for run in ready(runs, states | {"q/parent": "finished", "q/x": "queued"}, 2)] == ["child"]
    assert ready(runs, states | {"q/x": "running"}, 1) == []


# On this machine ----------------------------------------------------------------------------------------------------------------


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
        if run.name in backend._adopted and "is being trained by" in (run.folder / "log.txt").read_text():
            (run.folder / "record.json").write_text(json.dumps({"status": "finished", "reason": None}))
            lock.release()

    board = launch([run], backend, view, slots=1, poll_seconds=0.05)
    assert set(seen) == {"running", "finished"}
    assert board.is_finished
    assert starts(run) == []


def matched(of="q_base", how="late"):
    return {"arms": ["q_a"], "gpu_hours": {"of": of, "shares": [0.35]}, "set": {"fake.ends": how}}


def test_a_second_start_has_the_budget_of_the_first(runs_of):
    runs = runs_of({"arms": ["q_base"]}, matched())
    assert run_all(runs).states[runs[1].name] == "failed"
    assert run_all(runs).is_finished
    for start in starts(runs[1]):
        assert start["arguments"][-4:] == ["--model.budget.tokens", "null", "--model.budget.gpu_hours", "0.7"]
    assert len(starts(runs[1])) == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"totals": {"gpu_seconds": {"compute": 3600.0}}}, r"compute_seconds 7200.0 → 3600.0, gpu_hours 0.7 → 0.35"),
        ({"started": "2026-01-02T00:00:00+00:00"}, r"started None → 2026-01-02"),
    ],
)
def test_a_baseline_that_was_trained_again_changes_no_budget_silently(runs_of, change, named):
    baseline, run = runs = runs_of({"arms": ["q_base"]}, matched())
    run_all(runs)
    record = baseline.folder / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    board = run_all(runs)
    assert board.states[run.name] == "failed"
    assert re.search(rf"budget\.json: .*{named}.*delete this file", board.reasons[run.name])
    (run.folder / "budget.json").unlink()
    assert run_all(runs).is_finished


def test_another_baseline_changes_no_budget_silently(runs_of):
    both = [{"arms": ["q_base"]}, {"arms": ["q_b"]}]
    run_all(runs_of(*both, matched()))
    (*_, run) = runs = runs_of(*both, matched("q_b"))
    assert "of q_base/m → q_b/m" in run_all(runs).reasons[run.name]


def test_a_budget_needs_a_finished_baseline(tmp_path):
    with pytest.raises(NotFinished, match="not finished, so its GPU-hours are not known"):
        matched_budget(tmp_path / "run", "q/baseline", tmp_path / "baseline", 0.5)
    assert not (tmp_path / "run").exists()


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


# GPUs of runs that an earlier launcher began ------------------------------------------------------------------------------------


def with_gpus(*devices):
    places = [environment() | ({} if one is None else {"CUDA_VISIBLE_DEVICES": one}) for one in devices]
    return LocalBackend((sys.executable, str(FAKE)), places)


def test_a_living_run_of_an_earlier_launcher_keeps_its_gpus(runs_of):
    old, new = runs = runs_of(ends("waits", "q_a"), {"arms": ["q_b"]})
    earlier = with_gpus("0", "1")
    earlier.start(old, old.arguments)
    try:
        while holder(old.folder) is None:
            time.sleep(0.01)

        def view(board):
            if board.states[new.name] == "finished":
                (old.folder / "go").touch()

        assert launch(runs, with_gpus("0", "1"), view, slots=2, poll_seconds=0.01).is_finished
    finally:
        earlier.stop()
    assert [starts(run)[0]["environment"]["CUDA_VISIBLE_DEVICES"] for run in runs] == ["0", "1"]


@pytest.mark.parametrize(
    "place, room",
    [
        ({"slot": 1, "devices": "1"}, 1),
        ({"slot": 0, "devices": "0,1"}, 0),  # begun with --jobs 1 and CUDA_VISIBLE_DEVICES
        ({"slot": 0, "devices": None}, 0),  # begun with --jobs 1: all GPUs
        (None, 2),  # begun by hand
    ],
)
def test_gpus_are_compared_and_not_places(runs_of, place, room):
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    lock.acquire()
    if place is not None:
        (run.folder / "slot.json").write_text(json.dumps(place))
    backend = with_gpus("0", "1")
    assert backend.adopt(run)
    assert backend.room() == room
    lock.release()
    assert backend.room() == 2


def test_without_gpus_places_are_compared(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    lock.acquire()
    (run.folder / "slot.json").write_text(json.dumps({"slot": 1, "devices": None}))
    backend = with_gpus(None, None)
    assert backend.adopt(run)
    assert backend.room() == 1
    lock.release()


# Ending the launcher ------------------------------------------------------------------------------------------------------------


def send_when(condition, number):
    """From another thread, as a terminal would; gives up after a while so that a defect fails and does not hang."""

    def wait():
        for _ in range(1000):
            if condition():
                break
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Signals as a foreground process has them: a shell's background, nohup and Lightning leave some of them ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_runs_and_says_what_to_do(runs_of, capsys, number):
    runs = runs_of(ends("waits", "q_a", "q_b"))
    send_when(lambda: all((run.folder / "record.json").exists() for run in runs), number)
    console = Console(force_terminal=False)
    status = command.run_to_end("m", runs, local(2), slots=2, console=console, poll_seconds=0.01)
    assert status == 130
    assert "the same command continues every run" in capsys.readouterr().err
    for run in runs:
        assert holder(run.folder) is None
        with pytest.raises(ProcessLookupError):
            os.kill(starts(run)[0]["pid"], 0)


@pytest.fixture
def told():
    """Signals that reached the handlers from before the launcher."""
    seen = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda got, _: seen.append(got))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closing_terminal_may_say_so_twice_while_runs_stop(runs_of, told):
    """A second interruption would kill them before they have saved."""
    (run,) = runs_of(ends("waits", "q_a"))
    backend, stopped = local(), []
    stop = backend.stop

    def stop_told_again():
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        stop()
        stopped.append(True)

    backend.stop = stop_told_again
    send_when(lambda: (run.folder / "record.json").exists(), signal.SIGHUP)
    status = command.run_to_end("m", [run], backend, slots=1, console=Console(force_terminal=False), poll_seconds=0.01)
    assert (status, stopped, told) == (130, [True], [])
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM]  # the handlers are back


def test_nohup_is_respected(runs_of, told):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    (run,) = runs_of(ends("waits", "q_a"))

    def hang_up_then_let_it_end():
        if (run.folder / "record.json").exists():
            os.kill(os.getpid(), signal.SIGHUP)
            (run.folder / "go").touch()
        return (run.folder / "go").exists()

    send_when(hang_up_then_let_it_end, signal.SIGHUP)
    status = command.run_to_end("m", [run], local(), slots=1, console=Console(force_terminal=False), poll_seconds=0.01)
    assert status == 0


def test_a_run_that_does_not_stop_is_killed(tmp_path, runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    deaf = "import signal, pathlib, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf += f"; pathlib.Path({str(tmp_path / 'deaf')!r}).touch(); time.sleep(600)"
    backend = LocalBackend((sys.executable, "-c", deaf), [environment()], grace_seconds=0.1)
    backend.start(run, ())
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    (job,) = backend._jobs.values()
    backend.stop()
    assert job.process.returncode == -signal.SIGKILL


def test_what_is_left_is_listed_and_the_exit_status_says_so(runs_of, capsys):
    runs = runs_of({"arms": ["q_a"]}, ends("refused", "q_b"))
    console = Console(force_terminal=False)
    assert command.run_to_end("m", runs, local(), slots=1, console=console, poll_seconds=0.01) == 1
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 failed" in out
    assert "q_b/m  failed: the data are not there" in out
    assert command.run_to_end("m", runs[:1], local(), slots=1, console=console, poll_seconds=0.01) == 0


def test_runs_at_a_time_share_cores_and_gpus():
    assert environments_for(1, {"A": "1"}, ["0", "1"], 8) == [{"A": "1"}]
    assert environments_for(2, {}, [], 8) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert environments_for(4, {"OMP_NUM_THREADS": "3"}, [], 2) == [{"OMP_NUM_THREADS": "3"}] * 4
    given = environments_for(2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"}, ["4", "5", "6", "7", "8"], 3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["4,5", "6,7"]
    assert given[0]["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ValueError, match="expected at most 2, the number of GPUs"):
        environments_for(3, {}, ["0", "1"], 8)


# The lock -----------------------------------------------------------------------------------------------------------------------


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


# What is shown ------------------------------------------------------------------------------------------------------------------


def progress(**changes):
    values = {"stage": "C", "step": 4, "tokens": 1_500_000, "planned_tokens": 6_000_000, "planned_gpu_seconds": None}
    values |= {
        "fraction": 0.25,
        "loss": 3.14159,
        "gpu_seconds": 2400.0,
        "devices": 2,
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Progress(**values | changes)


def test_a_row_tells_how_far_a_run_is(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    board = Board(runs=[run], states={run.name: "running"})
    assert row(run, board) == ("q_a/m", "running", "", "", "", "")
    run.folder.mkdir(parents=True)
    progress().write(run.folder)
    assert Progress.read(run.folder) == progress()
    assert row(run, board) == ("q_a/m", "running", "C", "1.5M / 6M", "3.142", "1:00 h")
    timed = progress(planned_tokens=None, planned_gpu_seconds=9600.0, loss=None)
    timed.write(run.folder)
    assert row(run, board)[3:] == ("1.5M, 25% of 2:40 h", "", "1:00 h")
    board.states[run.name], board.reasons[run.name] = "failed", "disk full"
    assert row(run, board)[1] == "failed: disk full"


def test_lines_report_changes_at_once_and_progress_now_and_then(runs_of):
    run, other = runs = runs_of({"arms": ["q_a", "q_b"]})
    run.folder.mkdir(parents=True)
    now, lines = [0.0], []
    view = Lines(lines.append, every_seconds=30, clock=lambda: now[0], time_of_day=lambda: f"at {now[0]:g}")
    board = Board(runs=runs, states={run.name: "waiting", other.name: "waiting"})
    view(board)
    board.states[run.name] = "running"
    for second in (1, 10, 29, 31, 32):
        now[0] = second
        progress(tokens=second * 1000).write(run.folder)
        view(board)
    board.states[run.name] = "finished"
    view(board)
    assert [line.split("  ")[:4] for line in lines] == [
        ["at 0", "waiting: q_a/m, q_b/m"],
        ["at 0", "0 of 2 finished"],
        ["at 1", "q_a/m", "running", "stage C"],
        ["at 1", "0 of 2 finished, about 2:20 h left"],
        ["at 31", "q_a/m", "running", "stage C"],
        ["at 32", "q_a/m", "finished", "stage C"],
        ["at 32", "1 of 2 finished"],
    ]


def test_the_time_left_is_that_of_all_runs_and_unknown_without_any_progress(runs_of):
    runs = runs_of({"arms": ["q_base", "q_a", "q_b", "q_c"]})
    done, going, new, to_come = runs
    states = {done.name: "finished", going.name: "running", new.name: "running", to_come.name: "waiting"}
    board = Board(runs=runs, states=states)
    assert seconds_left(board) is None
    for run, fraction, seconds in (
        (done, 1.0, 2000.0),
        (going, 0.25, 2000.0),
    ):  # 1000 s and 4000 s in all, on 2 devices
        run.folder.mkdir(parents=True)
        progress(fraction=fraction, gpu_seconds=seconds).write(run.folder)
    mean = (1000 + 4000) / 2
    assert seconds_left(board) == (3000 + mean + mean) / 2
    board.states[to_come.name] = "blocked"
    assert seconds_left(board) == 3000  # the longest one
    board.states |= {going.name: "failed", new.name: "failed"}
    assert seconds_left(board) is None


# On a cluster -------------------------------------------------------------------------------------------------------------------


class LocalCluster:
    """submitit's own executor for processes of this machine, in place of SLURM's."""

    def __init__(self):
        self.submitit = pytest.importorskip("submitit")
        self.jobs = {}

    def submit(self, folder, parameters, job):
        executor = self.submitit.AutoExecutor(folder=folder, cluster="local")
        executor.update_parameters(timeout_min=1)
        self.parameters = parameters
        submitted = executor.submit(job)
        self.jobs[submitted.job_id] = submitted
        return submitted

    def find(self, folder, job_id, tasks):
        return self.jobs[job_id]


@pytest.fixture
def cluster(monkeypatch):
    """The folder of fake_fit can be imported by jobs, and GPUs are none."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKE.parent}:{ROOT}")
    return LocalCluster()


SETTINGS = SlurmSettings(partition="gpu", nodes=2, gpus_per_node=4, mem_gb=0)


def test_jobs_run_fit_and_their_records_say_how_they_ended(tmp_path, runs_of, cluster):
    backend = slurm.SlurmBackend(SETTINGS, "fake_fit:main", lambda: cluster)
    child = {"arms": ["q_a"], "set": start_of(tmp_path, "q_b/m")}
    runs = runs_of({"arms": ["q_b"]}, child, ends("diverged", "q_c"))
    board = launch(runs, backend, lambda board: None, slots=None, poll_seconds=0.05)
    assert board.states == {"q_b/m": "finished", "q_a/m": "finished", "q_c/m": "diverged"}
    arguments = starts(runs[0])[0]["arguments"]
    assert arguments[-8:-6] == ["--trainer.devices", "4"]
    assert arguments[-6:-4] == ["--trainer.num_nodes", "2"]
    assert json.loads(arguments[-3])[0]["init_args"] == {"auto_requeue": False}
    assert arguments[-2:] == ["--trainer.strategy", "fsdp2"]
    assert cluster.parameters["tasks_per_node"] == 4
    assert cluster.parameters["slurm_mem"] == "0"


def test_a_later_launcher_finds_the_jobs_again(runs_of, cluster):
    (run,) = runs_of(ends("waits", "q_a"))
    slurm.SlurmBackend(SETTINGS, "fake_fit:main", lambda: cluster).start(run, run.arguments)

    def view(board):
        assert board.states[run.name] in ("queued", "running", "finished")
        run.folder.mkdir(exist_ok=True)
        (run.folder / "go").touch()

    later = slurm.SlurmBackend(SETTINGS, "fake_fit:main", lambda: cluster)
    assert launch([run], later, view, slots=None, poll_seconds=0.05).is_finished
    assert len(starts(run)) == 1
    assert len(cluster.jobs) == 1


class Job:
    """A job that has ended by the time it is looked at, after ``does``."""

    job_id = "7"

    def __init__(self, does):
        self.does = does

    def done(self):
        self.does()
        return True


class Ended:
    """A cluster whose jobs end at once; ``how``: name of a job → what happens while it runs."""

    def __init__(self, **how):
        self.how = how

    def submit(self, folder, parameters, job):
        (folder / "7_0_log.err").write_text("slurmstepd: error: out of memory\n")
        return Job(lambda: self.how[parameters["name"].split("-")[0]](folder.parent))

    def find(self, folder, job_id, tasks):
        return Job(lambda: None)


def recording(status):
    def write(folder):
        (folder / "record.json").write_text(json.dumps({"status": status, "reason": f"it was {status}"}))

    return write


def raising(error):
    def fail(*_):
        raise error

    return fail


def on(cluster, runs):
    backend = slurm.SlurmBackend(SETTINGS, "fake_fit:main", lambda: cluster)
    return launch(runs, backend, lambda board: None, slots=None, poll_seconds=0.01)


def test_a_job_that_the_cluster_refuses_or_loses_fails_alone(runs_of, monkeypatch):
    runs = runs_of({"arms": ["q_a"]}, {"arms": ["q_b"]}, {"arms": ["q_c"]})
    cluster = Ended(q_b=raising(RuntimeError("sacct is gone")), q_c=recording("finished"))
    submit = cluster.submit

    def submit_but(folder, parameters, job):
        if parameters["name"] == "q_a-m":
            raise RuntimeError("sbatch: invalid partition")  # as submitit's FailedSubmissionError
        return submit(folder, parameters, job)

    monkeypatch.setattr(cluster, "submit", submit_but)
    board = on(cluster, runs)
    assert board.states == {"q_a/m": "failed", "q_b/m": "failed", "q_c/m": "finished"}
    assert board.reasons["q_a/m"] == "the cluster could not submit the job of q_a/m: sbatch: invalid partition"
    assert board.reasons["q_b/m"] == "the cluster could not look at the job of q_b/m: sacct is gone"


def test_a_file_of_a_job_that_cannot_be_read_fails_its_run_alone(runs_of):
    runs = runs_of({"arms": ["q_a"]}, {"arms": ["q_c"]})
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "slurm.json").write_text("{}")
    board = on(Ended(q_c=recording("finished")), runs)
    assert board.states == {"q_a/m": "failed", "q_c/m": "finished"}
    assert "slurm.json: job_id is missing" in board.reasons["q_a/m"]


@pytest.mark.parametrize(
    "before, during, state, reason",
    [
        ("interrupted", None, "failed", "ended before it began to train: slurmstepd: error: out of memory"),
        ("failed", None, "failed", "ended before it began to train: slurmstepd: error: out of memory"),
        ("failed", "running", "failed", "ended, and the record still says running: slurmstepd: error: out of memory"),
        (None, "failed", "failed", "it was failed"),
        ("failed", "interrupted", "interrupted", "it was interrupted"),
    ],
)
def test_a_record_from_before_a_job_says_nothing_about_it(runs_of, before, during, state, reason):
    (run,) = runs_of({"arms": ["q_a"]})
    run.folder.mkdir(parents=True)
    if before is not None:
        recording(before)(run.folder)
        os.utime(run.folder / "record.json", (1, 1))
    board = on(Ended(q_a=(lambda folder: None) if during is None else recording(during)), [run])
    assert (board.states[run.name], board.reasons[run.name]) == (state, reason)


def test_a_preempted_job_makes_the_same_call_again():
    pytest.importorskip("submitit")
    job = FitJob("fake_fit:main", ["--run.id", "x"])
    again = job.checkpoint()
    assert again.function is job
    assert (again.args, again.kwargs) == ((), {})


def test_without_submitit_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(RuntimeError, match=r'pip install "ttt-lit\[slurm\]"'):
        slurm.SlurmBackend(SETTINGS, "fake_fit:main")


# The command --------------------------------------------------------------------------------------------------------------------


def test_the_command_runs_a_matrix_file_quietly(tmp_path, runs_of, monkeypatch, capsys):
    runs_of({"arms": ["q_a"]})  # makes the configs
    plain = {"name": "m", "runs": [{"arms": ["q_a"]}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = command.LaunchOptions(config="m.yaml", root=str(tmp_path / "runs"))

    def checked(command_lines):
        return ["no such setting" if refuse and "--data.seed" in line else None for line in command_lines]

    def go():
        return command.launch_matrix(options, program=(sys.executable, str(FAKE)), entry="fake_fit:main", check=checked)

    refuse = True
    assert go() == 1
    assert "error: m.yaml: runs[0]: q_a/m: no such setting\n1 of 1 runs have" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    refuse = False
    assert go() == 0
    (line,) = (tmp_path / "runs" / "q_a" / "m" / "starts.jsonl").read_text().splitlines()
    assert json.loads(line)["arguments"][-2:] == ["--trainer.enable_progress_bar", "false"]
    assert "1 runs: 1 finished" in capsys.readouterr().out
    refuse = True
    assert go() == 0  # what is finished needs no settings any more
    with pytest.raises(ValueError, match="--jobs: got 0"):
        command.launch_matrix(replace(options, jobs=0), program=(), entry="")


def test_a_process_finds_settings_that_fit_does_not_take(tmp_path, monkeypatch):
    """Of all runs at once; an abbreviation is no setting either."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {budget: {tokns: 5}}\n")
    arm = ("--config", str(ROOT / "configs" / "q_p1_bridge.yaml"))
    good = (*arm, "--model.budget.tokens", "1000", "--model.stages.C.carry", "all", "--run.id", "m")
    plugins = slurm.cluster_arguments(SlurmSettings())
    monkeypatch.chdir(tmp_path)  # wherever it is called from
    found = errors_in_a_process(
        [
            (*good, *plugins),
            (*arm, "--model.budget.tokns", "5"),
            (*arm, "--model.budget.token", "5"),
            (*arm, "--model.stages.C.carri", "all"),
            (*arm, "--config", str(overlay)),
            (*arm, "--model.budget.tokens", "many"),
        ]
    )
    assert found[:5] == [
        None,
        "model.budget.tokns: fit has no such setting",
        "model.budget.token: fit has no such setting",
        "model.stages.C.carri: fit has no such setting",
        "model.budget.tokns: fit has no such setting",
    ]
    assert 'Parser key "model.budget.tokens"' in found[5]


def test_importing_the_launcher_loads_neither_torch_nor_lightning():
    code = "import sys, ttt_lit.experiment.launch.command; sys.exit(bool({'torch', 'lightning', 'submitit'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
