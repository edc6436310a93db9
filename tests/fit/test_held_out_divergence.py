"""A held-out loss that is no number ends a run as diverged, wherever it is measured, and the record always tells how a run ended."""

import dataclasses
import json
import math
import signal

import lightning as L
import pytest
import tiny
import torch

import cli
from callbacks import stage_transition
from callbacks.divergence_guard import DivergenceGuard
from callbacks.start_validation import StartValidation
from ttt_lit.checkpoint.store import load_checkpoint, save_checkpoint
from ttt_lit.record.schema import RunRecord
from ttt_lit.train import run as run_module
from ttt_lit.train import transition
from ttt_lit.train.divergence import Diverged
from ttt_lit.train.run import assemble, fit


def read(path):
    return RunRecord.read(path / "tiny" / "default")


def start(monkeypatch, change):
    """The next start has its parts changed; those after it do not."""

    def assemble_once(arguments, *, command):
        with monkeypatch.context() as inner:
            inner.setattr(run_module, "assemble", assemble)
            parts = assemble(arguments, command=command)
        change(parts)
        return parts

    monkeypatch.setattr(run_module, "assemble", assemble_once)


class BreaksReading(L.Callback):
    """In one stage, held-out blocks get no loss beyond the short context while the inner loop learns from them; with ``only_start``
    before the first optimiser step."""

    def __init__(self, stage, value, *, only_start=False):
        self.stage, self.value, self.only_start = stage, value, only_start

    def setup(self, trainer, module, stage):
        read = module.read

        def broken(tokens, *, mode, **rest):
            out = read(tokens, mode=mode, **rest)
            here = (
                module.entered >= 0 and module.plan.name == self.stage and not (self.only_start and trainer.global_step)
            )
            if here and mode == "meta" and not out.loss.requires_grad:
                out.token_nll[:, tiny.SHORT :] = self.value
            return out

        module.read = broken


class BreaksWeights(L.Callback):
    """The weights are gone by the time that a stage is validated, after training that showed nothing."""

    def on_validation_start(self, trainer, module):
        if module.plan.name == "B2":
            with torch.no_grad():
                module.model.decoder.get_parameter("norm.weight").fill_(math.inf)


def with_callback(callback):
    return lambda parts: parts.trainer.callbacks.append(callback)


@pytest.mark.parametrize(
    "callback, said",
    [
        (BreaksReading("B2", math.nan), "at context 32 with inner updates on is nan"),
        (BreaksReading("B2", math.inf), "at context 32 with inner updates on is inf"),
        (BreaksWeights(), "at context 32 with inner updates off is nan and with inner updates on is nan"),
    ],
    ids=["inner loop nan", "inner loop inf", "weights"],
)
def test_a_validation_that_is_no_number_ends_the_run_as_diverged(world, tmp_path, monkeypatch, capsys, callback, said):
    only_stage_ends = ("--model.validation.every_share=0", "--model.validation.damage_blocks=0")
    arguments = tiny.arguments(world, tmp_path, *only_stage_ends, steps=10)
    start(monkeypatch, with_callback(callback))
    assert cli.main(["fit", *arguments]) == 1
    folder = tmp_path / "tiny" / "default"
    good = folder / "checkpoints" / "B1"
    reason = f"validation loss of stage B2 {said}; the last good checkpoint is {good}. Lower inner.lr or the stage's lr"
    assert f"error: {reason}" in capsys.readouterr().err
    record = read(tmp_path)
    assert record.status == "diverged"
    assert record.reason.startswith(reason)
    assert record.ended is not None

    b1, b2, c = record.stages
    assert all(math.isfinite(one.nats_per_token) for one in b1.validations)
    off, on = b2.validations
    assert math.isnan(on.nats_per_token)
    assert math.isfinite(off.nats_per_token) == (not isinstance(callback, BreaksWeights))
    if isinstance(callback, BreaksReading):
        assert all(math.isfinite(one.short) and math.isnan(one.nats_per_token) for one in on.documents)
    assert len(b2.train_losses) == 3
    assert c.transition is None
    assert c.spent.tokens == 0
    # As after any divergence: nothing of the broken stage is offered as a checkpoint.
    assert good.is_dir()
    assert not (folder / "checkpoints" / "B2").exists()
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["path"] == "resume-2.ckpt"

    before = (folder / "record.json").read_bytes()
    with pytest.raises(ValueError, match="this run diverged .*validation loss of stage B2"):
        fit(arguments)
    assert (folder / "record.json").read_bytes() == before


EVALUATED = ("--model.validation.every_share=0.4", "--model.validation.damage_blocks=0")


def test_damage_that_is_no_number_ends_the_run_before_the_stage_trains(world, tmp_path, monkeypatch):
    arguments = tiny.arguments(world, tmp_path, "--model.validation.every_share=0", steps=10)
    start(monkeypatch, with_callback(BreaksReading("B2", math.nan)))
    with pytest.raises(RuntimeError, match="loss at the start of stage B2 at context 32 with inner updates on is nan"):
        fit(arguments)
    record = read(tmp_path)
    assert record.status == "diverged"
    last = record.stages[1].damage[-1]
    assert (last.when, last.context, last.inner) == ("start", "long", "on")
    assert math.isfinite(last.inside)
    assert record.stages[1].spent.optimizer_steps == 0


def test_damage_that_is_no_number_where_nothing_is_trained_ends_nothing(world, tmp_path, monkeypatch):
    """A stage that trains without updates: what unprepared ones do is recorded, as null."""
    only = ('--model.stages.B1={"enabled": true, "share": null}', "--model.stages.B2=null", "--model.stages.C=null")
    start(monkeypatch, with_callback(BreaksReading("B1", math.nan, only_start=True)))
    assert fit(tiny.arguments(world, tmp_path, *only, "--model.validation.every_share=0", steps=2)) == 0
    record = read(tmp_path)
    assert record.status == "finished"
    found = {(each.when, each.context, each.inner): each for each in record.stages[0].damage}
    broken = found.pop(("start", "long", "on"))
    assert math.isfinite(broken.inside)
    assert (broken.beyond, broken.nats) == (None, None)
    assert all(math.isfinite(each.nats) for each in found.values())


def test_an_evaluation_that_is_no_number_ends_the_run_before_a_resume_file_holds_it(world, tmp_path, monkeypatch):
    arguments = tiny.arguments(world, tmp_path, *EVALUATED, steps=10)

    def change(parts):
        next(one for one in parts.trainer.callbacks if hasattr(one, "save")).every_seconds = 0
        parts.trainer.callbacks.append(BreaksReading("C", math.nan))

    start(monkeypatch, change)
    with pytest.raises(RuntimeError, match="evaluation loss of stage C after 896 tokens"):
        fit(arguments)
    record = read(tmp_path)
    assert record.status == "diverged"
    assert record.reason.startswith(
        "evaluation loss of stage C after 896 tokens at context 32 with inner updates on is nan; "
    )
    assert record.stages[-1].spent.optimizer_steps == 2
    (point,) = record.evaluations
    assert point.inner_on is None
    assert math.isfinite(point.inner_off)
    pointer = tmp_path / "tiny" / "default" / "checkpoints" / "last.json"
    assert json.loads(pointer.read_text())["path"] == "resume-6.ckpt"


@pytest.fixture
def broken_checkpoint(world, tmp_path):
    """The world's checkpoint with a number that is none."""
    good, path = load_checkpoint(world / "checkpoint"), tmp_path / "broken"
    state = {name: tensor.clone() for name, tensor in good.state().items()}
    state["norm.weight"][0] = math.nan
    save_checkpoint(
        path,
        spec=good.spec,
        state=state,
        family=good.family,
        receipt=good.receipt,
        lineage=good.lineage,
        tokenizer=world / "tokenizer",
    )
    return path


def test_a_start_that_computes_no_loss_is_not_trained(world, tmp_path, broken_checkpoint):
    arguments = tiny.arguments(world, tmp_path, f"--model.start.init_from={broken_checkpoint}", steps=10)
    with pytest.raises(RuntimeError, match="start validation loss at context 32 with inner updates off is nan"):
        fit(arguments)
    record = read(tmp_path)
    assert record.status == "diverged"
    assert "nothing has been trained" in record.reason
    assert str(broken_checkpoint) in record.reason
    assert math.isnan(record.start_validation.nats_per_token)
    assert record.totals.tokens == 0
    assert record.stages[0].transition is None
    with pytest.raises(ValueError, match="this run diverged"):
        fit(arguments)


def test_a_conversion_that_breaks_the_network_is_not_taken_for_broken_weights(world, tmp_path, monkeypatch):
    def broken(*arguments, **others):
        return dataclasses.replace(transition.prove_transition(*arguments, **others), after=float("nan"))

    monkeypatch.setattr(stage_transition, "prove_transition", broken)
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    with pytest.raises(RuntimeError, match="nan after .*a conversion that preserves the function must agree") as caught:
        parts.trainer.fit(parts.module, datamodule=parts.data)
    assert not isinstance(caught.value, Diverged)
    record = RunRecord.read(parts.run.folder)
    assert (record.status, "must agree" in record.reason) == ("diverged", True)


def test_without_a_start_validation_the_first_transition_finds_it(world, tmp_path, monkeypatch, broken_checkpoint):
    monkeypatch.setattr(StartValidation, "on_train_epoch_start", L.Callback.on_train_epoch_start)
    reason = "loss of a fixed batch before the transition into stage B1 at context 16 with inner updates off is nan"
    with pytest.raises(RuntimeError, match=f"{reason}; nothing has been trained"):
        fit(tiny.arguments(world, tmp_path, f"--model.start.init_from={broken_checkpoint}", steps=10))
    record = read(tmp_path)
    assert record.status == "diverged"
    assert math.isnan(record.stages[0].transition.before)
    assert record.totals.tokens == 0


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            raise OSError("the device is gone")


class Unjudged(L.Callback):
    """Stands before the guard: a loss that is no number is in the history, and the guard does not see it."""

    def __init__(self, error=None):
        self.error = error

    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            module.history.stage(module.plan.name).losses[-1] = math.nan
            if self.error is not None:
                raise self.error


@pytest.mark.parametrize(
    "error, raised, then",
    [
        (OSError("the device is gone"), OSError, "; the device is gone"),
        (KeyboardInterrupt(), KeyboardInterrupt, "; stopped at once by Ctrl-C"),
        (None, ValueError, ""),  # nothing else stops the run: the record at the end of the stage cannot hold the number
    ],
    ids=["error", "interrupt", "record"],
)
def test_a_number_that_was_never_judged_makes_the_run_diverged_whatever_stopped_it(
    world, tmp_path, monkeypatch, error, raised, then
):
    def change(parts):
        callbacks = parts.trainer.callbacks
        guard = next(number for number, one in enumerate(callbacks) if isinstance(one, DivergenceGuard))
        callbacks.insert(guard, Unjudged(error))

    start(monkeypatch, change)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            fit(tiny.arguments(world, tmp_path, steps=10))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from there on
    record = read(tmp_path)
    assert record.status == "diverged"
    assert record.reason == "record.stages[0].train_loss_first is nan" + then


@pytest.mark.parametrize("part", ["RunRecorder._stage", "_git"])
def test_a_record_that_cannot_be_made_hides_nothing_and_does_not_stay_running(
    world, tmp_path, monkeypatch, capsys, part
):
    """The one from before the first step is ended instead."""

    def broken(*_):
        raise KeyError("a bug")

    class FailsTwice(Fails):
        def on_train_batch_end(self, trainer, module, *_):
            monkeypatch.setattr(f"callbacks.run_record.{part}", broken)
            super().on_train_batch_end(trainer, module)

    start(monkeypatch, with_callback(FailsTwice()))
    with pytest.raises(OSError, match="the device is gone"):
        fit(tiny.arguments(world, tmp_path, steps=10))
    record = read(tmp_path)
    assert record.status == "failed"
    assert record.reason == "the device is gone; the record could not be completed (KeyError: 'a bug')"
    assert record.ended is not None
    assert "could not be completed" in capsys.readouterr().err


def test_a_disk_that_takes_no_record_hides_nothing(world, tmp_path, monkeypatch, capsys):
    def full(self, path):
        raise OSError("no space left")

    class FillsDisk(Fails):
        def on_train_batch_end(self, trainer, module, *_):
            monkeypatch.setattr(RunRecord, "write", full)
            super().on_train_batch_end(trainer, module)

    start(monkeypatch, with_callback(FillsDisk()))
    with pytest.raises(OSError, match="the device is gone"):
        fit(tiny.arguments(world, tmp_path, steps=10))
    assert (
        "record.json: the record could not be completed (OSError: no space left), nor ended" in capsys.readouterr().err
    )
