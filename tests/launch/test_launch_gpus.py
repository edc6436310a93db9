"""The launcher: which GPUs and cores a run gets, also beside runs that an earlier launcher began."""

import json
import sys
import time

import pytest
from helpers.launching import FAKE, ends, environment, starts

from ttt_lit.launch.local import LocalBackend, environments_for
from ttt_lit.launch.loop import launch
from ttt_lit.train.lock import RunLock, holder


def with_gpus(*devices):
    places = [environment() | ({} if one is None else {"CUDA_VISIBLE_DEVICES": one}) for one in devices]
    return LocalBackend((sys.executable, str(FAKE)), places)


def test_runs_at_a_time_share_cores_and_gpus():
    assert environments_for(1, {"A": "1"}, ["0", "1"], 8) == [{"A": "1"}]
    assert environments_for(2, {}, [], 8) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert environments_for(4, {"OMP_NUM_THREADS": "3"}, [], 2) == [{"OMP_NUM_THREADS": "3"}] * 4
    given = environments_for(2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7,8"}, ["4", "5", "6", "7", "8"], 3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["4,5", "6,7"]
    assert given[0]["OMP_NUM_THREADS"] == "1"
    with pytest.raises(ValueError, match="expected at most 2, the number of GPUs"):
        environments_for(3, {}, ["0", "1"], 8)


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
    "devices, place, room",
    [
        ("01", {"slot": 1, "devices": "1"}, 1),
        ("01", {"slot": 0, "devices": "0,1"}, 0),  # begun with --jobs 1 and CUDA_VISIBLE_DEVICES
        ("01", {"slot": 0, "devices": None}, 0),  # begun with --jobs 1: all GPUs
        ("01", None, 2),  # begun by hand
        ((None, None), {"slot": 1, "devices": None}, 1),  # without GPUs places are compared
    ],
)
def test_gpus_are_compared_and_not_places(runs_of, devices, place, room):
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    lock.acquire()
    if place is not None:
        (run.folder / "slot.json").write_text(json.dumps(place))
    backend = with_gpus(*devices)
    assert backend.state(run) == "running"
    assert backend.room() == room
    lock.release()
    assert backend.room() == 2
