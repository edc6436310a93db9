"""The launcher: which run may start, and which never will."""

from ttt_lit.launch.matrix import PlannedRun
from ttt_lit.launch.schedule import ready, with_blocked


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
