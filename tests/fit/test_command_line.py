"""What a user sees: help at once, one line for every mistake, and the names of what is missing and the command that makes it."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import cli


@pytest.fixture
def one_line(capsys):
    """Run a command that must fail; return its single line of explanation."""

    def run(*arguments, status=1):
        assert cli.main([str(argument) for argument in arguments]) == status
        lines = capsys.readouterr().err.strip().splitlines()
        explained = [line for line in lines if line.startswith("error: ")]
        assert len(explained) == 1, lines
        return explained[0]

    return run


def test_help_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_help_of_report_loads_neither_torch_nor_lightning():
    code = "import sys, cli\ntry: cli.main(['report', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_command_names_the_known_ones(one_line):
    assert "known are import, prepare, probe, plan, fit" in one_line("fut", status=2)


@pytest.mark.parametrize("package", ["lightning", "pytorch-lightning"])
def test_malicious_lightning_is_refused_before_it_is_imported(monkeypatch, one_line, package):
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.3" if name == package else real(name))
    assert "malicious release (GHSA-w37p-236h-pfx3)" in one_line("fit", "--config", "configs/q_p1_bridge.yaml")


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
@pytest.mark.parametrize("command", ["fit", "prepare"])
def test_a_key_that_is_written_twice_is_refused_and_not_half_of_it_dropped(tmp_path, one_line, command, spelling):
    path = tmp_path / "overlay.yaml"
    path.write_text("model:\n  budget: {tokens: 4096}\nmodel:\n  inner: {lr: 0.5}\n")
    message = one_line(command, *spelling.format(path).split())
    assert f"{path}: line 3: the key model appears twice (first in line 1); remove one" in message


def test_what_the_planner_needs_is_not_ignored_by_the_launcher(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["matrix", "--config", "none.yaml", "--device", "h100"])
    assert stop.value.code == 2
    assert "--device is for the planner: add --dry-run, or leave it out" in capsys.readouterr().err


def test_a_missing_checkpoint_names_the_import_command(world, tmp_path, one_line):
    arguments = tiny.arguments(world, tmp_path, f"--model.start.init_from={tmp_path}/none")
    assert f"{tmp_path}/none does not exist; make it with: python cli.py import" in one_line("fit", *arguments)


def test_missing_data_names_the_prepare_command(world, tmp_path, one_line):
    message = one_line("fit", *tiny.arguments(world, tmp_path, f"--data.long={tmp_path}/none"))
    assert f"{tmp_path}/none" in message
    assert "python cli.py prepare" in message


# The last one is the beginning of a real key: nothing is completed, or a slip would train something else.
@pytest.mark.parametrize(
    "key", ["model.size.chnk", "model.stages.B1.widow_share", "model.stages.B9", "model.innr.lr", "model.budget.token"]
)
def test_a_misspelt_key_is_named_in_one_line(world, tmp_path, one_line, key):
    assert f"{key}: fit has no such setting" in one_line("fit", *tiny.arguments(world, tmp_path, f"--{key}=1"))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("--trainer.max_epochs=3", "trainer: max_epochs follow from the run's stages"),
        ("--trainer.max_steps=3", "trainer: max_steps follow from the run's stages"),
        ("--trainer.gradient_clip_val=1", "trainer: gradient_clip_val follow"),
        ("--trainer.precision=bf16-true", "trainer.precision: got bf16-true, expected 32-true or bf16-mixed"),
        ("--trainer.accelerator=gpu", "trainer: "),
        ("--model.stages.C.lr=abc", "model.stages.C.lr: Expected a <class 'float'>. Got value: abc"),
        ("--config=none.yaml", "none.yaml"),
        ("--trainer.callbacks=[]", "trainer.callbacks: got none of ours, expected FairnessBudget"),
        ("--model.inner.lr=0", "stage B2: mode meta with inner.lr 0 updates nothing; use mode static"),
        ("--model.validation.subset=3", "expected a subset that divides blocks"),
        ("--model.validation.blocks=4000", "model.validation.blocks: "),
        ("--model.budget.gpu_hours=1", "expected exactly one of tokens and gpu_hours; set the other to null"),
        ("--model.size.long=64", "expected per_document with context 64"),
        ("--model.size.chunk=5", "stage B2: context 16 is not a multiple of size.chunk 5"),
        ("--model.budget.tokens=1000", "1000 tokens are not whole optimiser steps of 128 tokens; use 896 or 1024"),
        ("--model.ttt=null", "stage B2: mode meta needs TTT layers; set model.ttt"),
        ("--model.start.load=all", "load all needs a checkpoint with every tensor of this run"),
        ("--model.size.tokens_per_step=80", "stage C: size.tokens_per_step 80 is not whole sequences of 32 tokens"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(world, tmp_path, one_line, setting, message):
    assert message in one_line("fit", *tiny.arguments(world, tmp_path, setting))


def test_validate_measures_a_checkpoint_and_writes_nothing(world, tmp_path, capsys):
    assert cli.main(["validate", *tiny.arguments(world, tmp_path, "--run.stage=C")]) == 0
    out = capsys.readouterr().out
    assert "stage C, inner loop off: " in out
    assert "stage C, inner loop on: " in out
    assert "bits per byte (128 tokens in 4 blocks)" in out
    assert not list(tmp_path.iterdir())


def test_prepare_refuses_a_misspelt_key(tmp_path, capsys):
    (tmp_path / "data.yaml").write_text("source: stdlib\ntokenzer: x\n")
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--config", str(tmp_path / "data.yaml")])
    assert "tokenzer" in capsys.readouterr().err


def test_a_model_goes_out_and_comes_back_through_the_commands(world, tmp_path, capsys, one_line):
    """export → import → export: with parity, an extra tensor allowed by name, and the same bytes at the end."""
    first, ours, second = tmp_path / "first", tmp_path / "ours", tmp_path / "second"
    assert cli.main(["export", "--checkpoint", str(world / "checkpoint"), "--output", str(first)]) == 0
    tensors = load_file(first / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(2)}, first / "model.safetensors", metadata={"format": "pt"})
    assert "model.extra" in one_line("import", "--source", first, "--output", ours)
    assert not ours.exists()
    allowed = ["--allow", "model.extra=left over from training"]
    assert cli.main(["import", "--source", str(first), "--output", str(ours), *allowed]) == 0
    audit = json.loads((ours / "audit.json").read_text())
    assert "left over from training" in json.dumps(audit)
    assert audit["parity"] is not None
    assert cli.main(["export", "--checkpoint", str(ours), "--output", str(second)]) == 0
    again = load_file(second / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_validate_asks_only_for_what_its_stage_needs(world, tmp_path, capsys):
    """A dense import can be measured in stage B1 although B2 and C would need TTT layers."""
    given = tiny.arguments(world, tmp_path, "--run.stage=B1", "--model.ttt=null")
    assert cli.main(["validate", *given]) == 0
    assert "inner loop on" not in capsys.readouterr().out


def test_a_checkpoint_without_tokenizer_is_not_trained_on_just_any_data(world, tmp_path, one_line):
    tiny.make_checkpoint(tmp_path / "bare", tokenizer=None)
    message = one_line("fit", *tiny.arguments(world, tmp_path, f"--model.start.init_from={tmp_path}/bare"))
    assert "the checkpoint has no tokenizer" in message


@pytest.mark.parametrize(
    "command, words",
    [("prepare", "Documents one after another"), ("fit", "the length of the step over all fast weights")],
)
def test_help_explains_the_settings(capsys, command, words):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert words.lower() in text.lower()
    assert "--optimizer" not in text


def test_prepare_says_what_it_made_and_that_it_was_there(world, tmp_path, capsys):
    given = [f"--source={world}/corpus", f"--tokenizer={world}/tokenizer", f"--output={tmp_path}/out", "--context=16"]
    for note in ("validation documents with", "the source was not read again"):
        assert cli.main(["prepare", *given, "--layout=packed", "--validation_fraction=0.2"]) == 0
        assert note in capsys.readouterr().out
