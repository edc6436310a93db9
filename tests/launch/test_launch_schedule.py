"""The launcher: which run may start, and which never will."""

from ttt_lit.launch.loop import Board
from ttt_lit.launch.matrix import PlannedRun


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
