"""What a matrix prints before anything starts: commands, budgets, hours and memory, and what is not known yet."""

import json
from types import SimpleNamespace

import pytest

from ttt_lit.launch import dry_run as module
from ttt_lit.launch.command import LaunchOptions
from ttt_lit.plan.config import NotKnown
from ttt_lit.plan.devices import device_named
from ttt_lit.plan.plan import PlanOptions

DEVICE = device_named("h200", peak_tflops=None, memory_gib=None)


def plan_of(arguments, options=None, *, hours=10.0, gib=3):
    """As the planner returns it: two stages, which share a budget in time."""
    if "--model.budget.gpu_hours" in arguments:
        hours = float(arguments[arguments.index("--model.budget.gpu_hours") + 1]) / 2
    stage = SimpleNamespace(device_hours=hours, memory=SimpleNamespace(total=gib * 2**30))
    return None, DEVICE, None, [stage, stage]


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Exit status and lines for a time-matched arm and its baseline with two seeds each; ``plan`` is the planner."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.yaml").write_text("run: {root: runs}\nmodel: {budget: {tokens: 1000}}\n")
    for arm in ("q_base", "q_a"):
        (tmp_path / "configs" / f"{arm}.yaml").write_text(f"run: {{experiment: {arm}}}\n")
    (tmp_path / "m.yaml").write_text(
        "name: m\nruns:\n  - {arms: [q_a], seeds: [0, 1], gpu_hours: {of: q_base, shares: [0.35]}}\n"
        "  - {arms: [q_base], seeds: [0, 1]}\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(plan=plan_of, error=None, **planning):
        monkeypatch.setattr(module, "planned", plan)
        options = LaunchOptions(config="m.yaml")
        status = module.dry_run(options, PlanOptions(**planning), check=lambda lines: [error] * len(lines))
        said = capsys.readouterr()
        return status, (said.out + said.err).splitlines()

    return run


def raising(error):
    def plan(arguments, options):
        raise error

    return plan


def finish(folder, **others):
    folder.mkdir(parents=True)
    record = {"status": "finished", "reason": None, "totals": {"gpu_seconds": {"compute": 7200.0}}}
    (folder / "record.json").write_text(json.dumps(record | others))


def test_it_prints_command_budget_hours_memory_and_the_sum(dry_run):
    made = []
    status, lines = dry_run(lambda arguments, options: made.append(arguments) or plan_of(arguments))
    assert status == 0
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
    assert len(made) == 2  # seeds need no plan of their own


def test_a_finished_baseline_decides_the_budget_is_not_in_the_sum_and_nothing_is_written(dry_run, tmp_path):
    finish(tmp_path / "runs" / "q_base" / "m")
    status, lines = dry_run()
    assert status == 0
    assert lines[1].endswith("--model.budget.tokens null --model.budget.gpu_hours 0.7")
    assert lines[2].startswith("  budget 35 % of q_base/m; 0.7 GPU-hours")
    assert lines[6] == "[3/4] q_base/m (finished)"
    assert lines[8] == "  budget 1,000 tokens; nothing left to pay"
    assert lines[-1] == "4 runs: 27.7 GPU-hours left to pay; 1 finished or diverged and not in the sum"  # 0.7 + 7 + 20
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == ["record.json"]


@pytest.mark.parametrize("error", [FileNotFoundError("no such checkpoint"), NotKnown("devices: got auto")])
def test_what_is_decided_later_is_unknown_and_not_in_the_sum(dry_run, error):
    status, lines = dry_run(raising(error))
    assert status == 0
    assert lines[8] == f"  budget 1,000 tokens; unknown: {error}"
    assert lines[-1] == f"4 runs: GPU-hours not known ({error})"


def test_settings_that_do_not_fit_the_network_are_an_error_and_hours_beside_it_are_summed(dry_run):
    def plan(arguments, options):
        if "configs/q_a.yaml" in arguments:
            raise ValueError("stage C: updated_layers: got [9]")
        return plan_of(arguments)

    status, lines = dry_run(plan)
    assert status == 1
    assert lines[2].endswith("; error: stage C: updated_layers: got [9]")
    assert lines[8] == "  budget 1,000 tokens; 20 GPU-hours, 3 GiB on each device"


def test_hours_that_need_a_peak_and_memory_that_a_device_does_not_have_are_said(dry_run):
    _, lines = dry_run(lambda arguments, options: plan_of(arguments, hours=None, gib=140))
    assert lines[8].endswith("; GPU-hours not known, 140 GiB on each device, MORE THAN 90% of 141 GiB")
    assert lines[-1] == "4 runs: GPU-hours not known (the device has no published peak; give --peak-tflops)"


def test_what_cannot_be_planned_at_all_ends_it_before_anything_is_planned(dry_run):
    plan = raising(AssertionError("planned"))
    with pytest.raises(FileNotFoundError, match="--shape: none.json does not exist"):
        dry_run(plan, shape="none.json")
    status, lines = dry_run(plan, error="wrong")
    assert status == 1
    assert "error: m.yaml: runs[0]: q_a/m-t0.35-s1: wrong" in lines


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("record.json", "{", "record.json: not JSON"),
        ("budget.json", '{"of": "q_base/old", "gpu_hours": 3}', "budget.json: the budget was made from something else"),
    ],
)
def test_a_folder_that_cannot_be_read_is_that_runs_error_alone(dry_run, tmp_path, name, content, said):
    finish(tmp_path / "runs" / "q_base" / "m")
    path = tmp_path / "runs" / "q_a" / "m-t0.35" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    status, lines = dry_run()
    assert status == 1
    assert lines[0] == "[1/4] q_a/m-t0.35"
    assert lines[1].startswith("  error: ")
    assert said in lines[1]
    heads = [line for line in lines if line.startswith("[")]
    assert heads[1:] == ["[2/4] q_a/m-t0.35-s1", "[3/4] q_base/m (finished)", "[4/4] q_base/m-s1"]
    assert "1 not known and not in the sum" in lines[-1]
