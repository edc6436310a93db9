"""What a matrix prints before anything starts: commands, budgets, hours and memory, and what is not known yet."""

import json
from types import SimpleNamespace

import pytest
import yaml

from ttt_lit.experiment.launch import dry_run as module
from ttt_lit.experiment.launch.command import LaunchOptions
from ttt_lit.experiment.launch.dry_run import dry_run
from ttt_lit.experiment.plan import PlanOptions

OPTIONS = LaunchOptions(config="m.yaml")


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """A matrix of a baseline and a time-matched arm with two seeds each, and the arguments of every plan that was made."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("run: {root: runs}\nmodel: {budget: {tokens: 1000}}\n")
    for arm in ("q_base", "q_a"):
        (tmp_path / "configs" / f"{arm}.yaml").write_text(f"run: {{experiment: {arm}}}\n")
    matched = {"arms": ["q_a"], "seeds": [0, 1], "gpu_hours": {"of": "q_base", "shares": [0.35]}}
    plain = {"name": "m", "runs": [matched, {"arms": ["q_base"], "seeds": [0, 1]}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(tmp_path)
    made = []

    def planned(arguments, planning):
        made.append(arguments)
        stage = {"device_hours": 10.0, "memory": SimpleNamespace(total=3 * 2**30)}
        if "--model.budget.gpu_hours" in arguments:
            stage["device_hours"] = float(arguments[arguments.index("--model.budget.gpu_hours") + 1]) / 2
        return [SimpleNamespace(**stage), SimpleNamespace(**stage)]

    monkeypatch.setattr(module, "_planned_stages", planned)
    return made


def test_it_prints_command_budget_hours_memory_and_the_sum(plans, capsys):
    assert dry_run(OPTIONS, PlanOptions()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] q_a/m-t0.35"
    assert lines[1] == (
        "  python cli.py fit --config configs/q_a.yaml --model.start.seed 0 --data.seed 0 --run.id m-t0.35 --run.share 0.35 "
        "--trainer.enable_progress_bar false"
    )
    assert lines[2] == "  budget 35 % of q_base/m; 7 GPU-hours, 3 GiB on each device"
    assert lines[8] == "  budget 1,000 tokens; 20 GPU-hours, 3 GiB on each device"
    assert lines[-1] == "4 runs: 54 GPU-hours"
    assert len(plans) == 2  # seeds need no plan of their own


def test_a_finished_baseline_decides_the_budget_and_nothing_is_written(plans, tmp_path, capsys):
    folder = tmp_path / "runs" / "q_base" / "m"
    folder.mkdir(parents=True)
    record = {"status": "finished", "reason": None, "totals": {"gpu_seconds": {"compute": 7200.0}}}
    (folder / "record.json").write_text(json.dumps(record))
    dry_run(OPTIONS, PlanOptions())
    out = capsys.readouterr().out
    assert "--model.budget.tokens null --model.budget.gpu_hours 0.7" in out
    assert "budget 35 % of q_base/m; 0.7 GPU-hours" in out
    assert "q_base/m (finished)" in out
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["record.json"]


def test_what_does_not_exist_yet_is_unknown_and_not_in_the_sum(plans, monkeypatch, capsys):
    def planned(arguments, planning):
        raise FileNotFoundError(
            "model.start.init_from: artifacts/checkpoint does not exist, so the network's shape is not known"
        )

    monkeypatch.setattr(module, "_planned_stages", planned)
    assert dry_run(OPTIONS, PlanOptions()) == 0
    out = capsys.readouterr().out
    assert "budget 1,000 tokens; unknown: artifacts/checkpoint does not exist yet" in out
    assert "4 runs: 0 GPU-hours; 4 not known" in out
