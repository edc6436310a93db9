"""What a matrix prints before anything starts: commands, budgets, hours and memory, and what is not known yet."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ttt_lit.launch import dry_run as module
from ttt_lit.launch.command import LaunchOptions
from ttt_lit.plan.config import NotKnown
from ttt_lit.plan.devices import device_named
from ttt_lit.plan.plan import PlanOptions

DEVICE = device_named("h200", peak_tflops=None, memory_gib=None)
OPTIONS = LaunchOptions(config="m.yaml")


def plan_of(*stages):
    """As the planner returns it."""
    return None, DEVICE, None, list(stages)


def dry_run(options, planning, check=lambda command_lines: [None] * len(command_lines)):
    return module.dry_run(options, planning, check=check)


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
        return plan_of(SimpleNamespace(**stage), SimpleNamespace(**stage))

    monkeypatch.setattr(module, "planned", planned)
    return made


def test_it_prints_command_budget_hours_memory_and_the_sum(plans, capsys):
    assert dry_run(OPTIONS, PlanOptions()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] q_a/m-t0.35"
    assert lines[1] == (
        "  python cli.py fit --config configs/q_a.yaml --model.start.seed 0 --data.seed 0 --run.id m-t0.35 --run.share 0.35 "
        "--trainer.enable_progress_bar false --model.budget.tokens null --model.budget.gpu_hours '<0.35 × GPU-hours of q_base/m>'"
    )
    assert lines[2] == (
        "  budget 35 % of q_base/m, which is not finished: the command can run once its GPU-hours are known; 7 GPU-hours, 3 GiB on each "
        "device"
    )
    assert lines[8] == "  budget 1,000 tokens; 20 GPU-hours, 3 GiB on each device"
    assert lines[-1] == "4 runs: 54 GPU-hours"
    assert len(plans) == 2  # seeds need no plan of their own


def test_a_finished_baseline_decides_the_budget_and_nothing_is_written(plans, tmp_path, capsys):
    finish(tmp_path / "runs" / "q_base" / "m")
    dry_run(OPTIONS, PlanOptions())
    out = capsys.readouterr().out
    assert "--model.budget.tokens null --model.budget.gpu_hours 0.7" in out
    assert "budget 35 % of q_base/m; 0.7 GPU-hours" in out
    assert "q_base/m (finished)" in out
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["record.json"]


def test_what_does_not_exist_yet_is_unknown_and_not_in_the_sum(plans, monkeypatch, capsys):
    def planned(arguments, planning):
        raise FileNotFoundError("model.start.init_from: artifacts/checkpoint does not exist; use --shape FILE")

    monkeypatch.setattr(module, "planned", planned)
    assert dry_run(OPTIONS, PlanOptions()) == 0
    out = capsys.readouterr().out
    why = "model.start.init_from: artifacts/checkpoint does not exist; use --shape FILE"
    assert f"budget 1,000 tokens; unknown: {why}" in out
    assert out.splitlines()[-1] == f"4 runs: GPU-hours not known ({why})"


def test_hours_that_need_a_peak_say_so_beside_those_that_are_known(plans, monkeypatch, capsys):
    def planned(arguments, planning):
        hours = None if "configs/q_a.yaml" in arguments else 10.0
        return plan_of(SimpleNamespace(device_hours=hours, memory=SimpleNamespace(total=0.0)))

    monkeypatch.setattr(module, "planned", planned)
    plain = yaml.safe_load(Path("m.yaml").read_text())
    plain["runs"][0].pop("gpu_hours")
    Path("m.yaml").write_text(yaml.safe_dump(plain))
    dry_run(OPTIONS, PlanOptions())
    assert capsys.readouterr().out.splitlines()[-1] == (
        "4 runs: 20 GPU-hours; 2 not known and not in the sum (the device has no published peak; give --peak-tflops)"
    )


def test_memory_that_a_device_does_not_have_is_said(plans, monkeypatch, capsys):
    stage = SimpleNamespace(device_hours=10.0, memory=SimpleNamespace(total=140 * 2**30))
    monkeypatch.setattr(module, "planned", lambda arguments, planning: plan_of(stage))
    dry_run(OPTIONS, PlanOptions())
    assert "140 GiB on each device, MORE THAN 90% of 141 GiB" in capsys.readouterr().out


def test_a_shape_that_is_not_there_is_an_error_and_not_a_run_without_hours(plans):
    with pytest.raises(FileNotFoundError, match="--shape: none.json does not exist"):
        dry_run(OPTIONS, PlanOptions(shape="none.json"))
    assert plans == []


def test_settings_that_fit_does_not_take_end_it_before_anything_is_planned(plans, capsys):
    status = dry_run(OPTIONS, PlanOptions(), lambda lines: ["wrong" if "q_a" in line[1] else None for line in lines])
    assert status == 1
    assert "error: m.yaml: runs[0]: q_a/m-t0.35-s1: wrong" in capsys.readouterr().err
    assert plans == []


def finish(folder, **others):
    folder.mkdir(parents=True)
    record = {"status": "finished", "reason": None, "totals": {"gpu_seconds": {"compute": 7200.0}}}
    (folder / "record.json").write_text(json.dumps(record | others))


def test_finished_runs_are_not_in_the_sum(plans, tmp_path, capsys):
    finish(tmp_path / "runs" / "q_base" / "m")
    assert dry_run(OPTIONS, PlanOptions()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[8] == "  budget 1,000 tokens; nothing left to pay"
    assert lines[-1] == "4 runs: 27.7 GPU-hours left to pay; 1 finished or diverged and not in the sum"  # 0.7 + 7 + 20


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("q_a/m-t0.35/record.json", "{", "record.json: not JSON"),
        (
            "q_a/m-t0.35/budget.json",
            '{"of": "q_base/old", "gpu_hours": 3}',
            "budget.json: the budget was made from something else",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_that_runs_error_alone(plans, tmp_path, capsys, name, content, said):
    finish(tmp_path / "runs" / "q_base" / "m")
    path = tmp_path / "runs" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert dry_run(OPTIONS, PlanOptions()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] q_a/m-t0.35"
    assert lines[1].startswith("  error: ")
    assert said in lines[1]
    assert [line for line in lines if line.startswith("[")][1:] == [
        "[2/4] q_a/m-t0.35-s1",
        "[3/4] q_base/m (finished)",
        "[4/4] q_base/m-s1",
    ]
    assert "1 not known and not in the sum" in lines[-1]


def test_settings_that_do_not_fit_the_network_are_an_error_and_what_the_machine_decides_is_not(
    plans, monkeypatch, capsys
):
    wrong = ValueError("stage C: updated_layers: got [9], expected some of the run's TTT layers [1]")

    def planned(arguments, planning):
        raise wrong if "configs/q_base.yaml" in arguments else NotKnown("trainer.devices: got auto")

    monkeypatch.setattr(module, "planned", planned)
    assert dry_run(OPTIONS, PlanOptions()) == 1
    out = capsys.readouterr().out
    assert "budget 1,000 tokens; error: stage C: updated_layers: got [9]" in out
    assert "unknown: trainer.devices: got auto" in out
    wrong = NotKnown("it depends")
    assert dry_run(OPTIONS, PlanOptions()) == 0
