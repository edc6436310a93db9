"""What the launcher shows: the row of a run, lines where there is no terminal, the time left."""

from ttt_lit.launch.loop import Board
from ttt_lit.launch.table import Lines, row, seconds_left
from ttt_lit.record.progress import Progress


def progress(**changes):
    values = {"stage": "C", "step": 4, "tokens": 1_500_000, "planned_tokens": 6_000_000, "planned_gpu_seconds": None}
    values |= {"fraction": 0.25, "loss": 3.14159, "gpu_seconds": 2400.0, "devices": 2, "time": "2026-01-01T00:00:00Z"}
    return Progress(**values | changes)


def test_a_row_tells_how_far_a_run_is(runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    board = Board(runs=[run], states={run.name: "running"})
    assert row(run, board) == ("q_a/m", "running", "", "", "", "")
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
    for run, fraction in ((done, 1.0), (going, 0.25)):  # 1000 s and 4000 s in all, on 2 devices
        progress(fraction=fraction, gpu_seconds=2000.0).write(run.folder)
    mean = (1000 + 4000) / 2
    assert seconds_left(board) == (3000 + mean + mean) / 2
    board.states[to_come.name] = "blocked"
    assert seconds_left(board) == 3000  # the longest one
    board.states |= {going.name: "failed", new.name: "failed"}
    assert seconds_left(board) is None
