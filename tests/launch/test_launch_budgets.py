"""The launcher: a budget that is a share of a baseline's GPU-hours is decided once."""

import json
import re

import pytest
from helpers.launching import run_all, starts

from ttt_lit.launch.folder import fix_hours


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


def test_a_budget_needs_a_finished_baseline(runs_of):
    baseline, run = runs_of({"arms": ["q_base"]}, matched())
    with pytest.raises(ValueError, match="not finished, so its GPU-hours are not known"):
        fix_hours(run, baseline)
    assert not run.folder.exists()
