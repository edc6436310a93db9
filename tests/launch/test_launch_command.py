"""The command ``matrix``: settings are checked first, what is left is listed, and it starts at once."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from helpers.launching import FAKE, ROOT, ends, local, to_end

from ttt_lit.launch import command, slurm
from ttt_lit.launch.command import LaunchOptions, are_refused, errors_in_a_process
from ttt_lit.launch.matrix_file import SlurmSettings, parse_matrix
from ttt_lit.train.arguments import errors_of
from ttt_lit.train.run import assemble
from ttt_lit.train.run_folder import claimed


def test_the_command_runs_a_matrix_file_quietly(tmp_path, runs_of, monkeypatch, capsys):
    runs_of({"arms": ["q_a"]})  # makes the configs
    (tmp_path / "m.yaml").write_text("name: m\nruns: [{arms: [q_a]}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = command.LaunchOptions(config="m.yaml", root=str(tmp_path / "runs"))

    def go(error):
        program = (sys.executable, str(FAKE))
        return command.launch_matrix(options, program=program, entry="", check=lambda lines: [error] * len(lines))

    assert go("no such setting") == 1
    assert "error: m.yaml: runs[0]: q_a/m: no such setting\nfit would refuse 1 of 1 runs" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert go(None) == 0
    (line,) = (tmp_path / "runs" / "q_a" / "m" / "starts.jsonl").read_text().splitlines()
    assert json.loads(line)["arguments"][-2:] == ["--trainer.enable_progress_bar", "false"]
    assert "1 runs: 1 finished" in capsys.readouterr().out
    assert go("no such setting") == 1  # finished or not: the file asks for something else now
    with pytest.raises(ValueError, match="--jobs: got 0"):
        command.launch_matrix(replace(options, jobs=0), program=(), entry="")


def test_arms_are_found_wherever_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "m.yaml").write_text("name: m\nruns: [{arms: [q_p1_bridge]}]\n")
    monkeypatch.chdir(tmp_path)
    _, (run,) = command.planned_runs(command.LaunchOptions(config="m.yaml"))
    assert run.arguments[:2] == ("--config", str(ROOT / "configs" / "q_p1_bridge.yaml"))


def test_what_is_left_is_listed_and_the_exit_status_says_so(runs_of, capsys):
    runs = runs_of({"arms": ["q_a"]}, ends("refused", "q_b"))
    assert to_end(runs, local()) == 1
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 failed" in out
    assert "q_b/m  failed: the data are not there" in out
    assert to_end(runs[:1], local()) == 0


@pytest.fixture
def arm(monkeypatch):
    monkeypatch.chdir(ROOT)
    return ("--config", "configs/q_p1_bridge.yaml", "--config", "configs/size/demo.yaml")


def test_what_fit_would_refuse_is_found_in_a_process_without_weights_or_data(tmp_path, monkeypatch):
    """Of all runs at once, wherever it is called from; an abbreviation is no setting either."""
    monkeypatch.chdir(tmp_path)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {budget: {tokns: 5}}\n")
    arm = [part for name in ("q_p1_bridge", "size/demo") for part in ("--config", str(ROOT / f"configs/{name}.yaml"))]
    refused = {
        ("--model.budget.token", "5"): "model.budget.token: fit has no such setting",
        ("--config", str(overlay)): "model.budget.tokns: fit has no such setting",
        ("--model.budget.tokens", "many"): 'Parser key "model.budget.tokens"',
        ("--model.stages.B1.share", "0.99"): "budget: the shares of B1, B2 sum to 1.08524, expected at most 1",
        ("--trainer.max_steps", "5"): "trainer: max_steps follow from the run's stages and budget; remove them",
        ("--trainer.callbacks", "[]"): "trainer.callbacks: got none of ours, expected FairnessBudget",
    }
    taken = [(), ("--trainer.devices", "auto"), slurm.cluster_arguments(SlurmSettings(gpus_per_node=2))]
    *found, one, two, three = errors_in_a_process([(*arm, *given) for given in (*refused, *taken)])
    assert (one, two, three) == (None, None, None)
    for error, said in zip(found, refused.values(), strict=True):
        assert said in error
        assert "\n" not in error


def begun(arguments):
    """The folder of a run that ``fit`` has begun to train with these arguments."""
    parts = assemble(list(arguments), command="fit")
    with claimed(parts.run.folder, parts.config):
        (parts.run.folder / "record.json").write_text('{"status": "finished"}')
    return parts.run.folder


def test_a_run_that_began_with_other_settings_is_refused_whatever_its_record_says(arm, tmp_path):
    """By the comparison that fit makes: what may change at a resume may change here."""
    asked = (*arm, "--run.root", str(tmp_path), "--run.id", "m")
    folder = begun(asked)
    free = ("--trainer.enable_progress_bar", "false", "--data.verify", "full")
    changes = [(), free, ("--model.stages.C.lr", "1e-2"), ("--model.budget.tokens", "1024000")]
    same, still, lr, tokens = errors_of([(*asked, *change) for change in changes])
    assert (same, still) == (None, None)
    assert lr == (
        f"the run was started with another configuration: model.stages.C.lr was 0.0003, now 0.01; go back to {folder}/config.yaml, give "
        f"the run another name in the matrix file (its name, or a label of an axis), or remove the folder {folder}"
    )
    assert "model.budget.tokens was " in tokens
    assert "now 1024000" in tokens
    (folder / "record.json").unlink()  # never began to train: fit takes the new settings
    assert errors_of([(*asked, *changes[2])]) == [None]


def test_where_a_run_that_has_ended_was_trained_does_not_matter(arm, tmp_path):
    """Nor a setting that only one of two versions knows: nobody will start it again."""
    asked = (*arm, "--run.root", str(tmp_path), "--run.id", "m")
    elsewhere = (*asked, *slurm.cluster_arguments(SlurmSettings(gpus_per_node=2)))
    folder = begun(asked)
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(kept | {"of_old": 1}))
    for status, said in (("finished", None), ("diverged", None), ("interrupted", "of_old was 1, now null")):
        (folder / "record.json").write_text(json.dumps({"status": status}))
        found, other = errors_of([elsewhere, (*elsewhere, "--model.stages.C.lr", "1e-2")])
        assert (found is None) if said is None else (said in found and "trainer.devices" in found)
        assert "model.stages.C.lr was 0.0003, now 0.01" in other


def test_a_folder_that_cannot_be_read_is_left_to_its_runs_own_start(arm, tmp_path):
    asked = (*arm, "--run.root", str(tmp_path), "--run.id", "m")
    folder = begun(asked)
    for name in ("record.json", "config.yaml"):
        (folder / name).write_text("{")
        assert errors_of([asked]) == [None]


def test_a_budget_in_hours_is_checked_as_the_first_start_fixed_it(runs_of):
    matched = {"arms": ["q_a"], "gpu_hours": {"of": "q_base", "shares": [0.5]}}
    baseline, run = runs = runs_of({"arms": ["q_base"]}, matched)
    budget = run.folder / "budget.json"
    for one in runs:
        one.folder.mkdir(parents=True)

    def checked():
        lines = []
        matrix = parse_matrix({"name": "m", "runs": [{"arms": ["q_a"]}]}, "m.yaml")
        are_refused(LaunchOptions(config=""), matrix, runs, lambda asked: lines.extend(asked) or [None] * len(asked))
        return lines[1:]

    assert checked() == [run.with_budget(1.0)]  # any number, and not the tokens of the file
    budget.write_text('{"gpu_hours": 0.25}')
    assert checked() == [run.with_budget(0.25)]
    record = {"status": "finished", "totals": {"gpu_seconds": {"compute": 7200.0}}}
    (baseline.folder / "record.json").write_text(json.dumps(record))
    assert checked() == []  # made from something else: the run fails alone, later
    budget.unlink()
    assert checked() == [run.with_budget(1.0 * 7200 / 3600 * 0.5)]
    budget.write_text('{"gpu_hours": 0.25}')
    (run.folder / "record.json").write_text('{"status": "finished"}')
    assert checked() == [run.with_budget(0.25)]  # which does not concern one that has ended
    budget.write_text("{")
    assert checked() == []


def test_importing_the_launcher_loads_neither_torch_nor_lightning():
    code = "import sys, ttt_lit.launch.command; sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
