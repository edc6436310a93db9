"""The command ``matrix``: settings are checked first, what is left is listed, and it starts at once."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from launching import FAKE, ROOT, ends, local
from rich.console import Console

from ttt_lit.experiment.launch import command, slurm
from ttt_lit.experiment.launch.check import errors_in_a_process
from ttt_lit.experiment.matrix_file import SlurmSettings


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


def test_what_is_left_is_listed_and_the_exit_status_says_so(runs_of, capsys):
    runs = runs_of({"arms": ["q_a"]}, ends("refused", "q_b"))
    console = Console(force_terminal=False)
    assert command.run_to_end("m", runs, local(), slots=1, console=console, poll_seconds=0.01) == 1
    out = capsys.readouterr().out
    assert "2 runs: 1 finished, 1 failed" in out
    assert "q_b/m  failed: the data are not there" in out
    assert command.run_to_end("m", runs[:1], local(), slots=1, console=console, poll_seconds=0.01) == 0


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
