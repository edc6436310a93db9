"""Runs that are cut off, limited by time, diverge, start from other runs or are started again."""

import json
import signal

import lightning as L
import pytest
import tiny
import torch
from fitting import Shapes, run
from safetensors.torch import load_file

from callbacks.stage_checkpoint import StageCheckpoint
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.record.schema import RunRecord
from ttt_lit.train.run import assemble, fit


class Stop(L.Callback):
    """Presses Ctrl-C after a number of optimiser steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.steps and module.at_boundary:
            raise KeyboardInterrupt


def run_until(world, runs, steps):
    """A run that saves at every optimiser step and is stopped before the save of step ``steps``: that one is repeated."""
    parts = assemble(tiny.arguments(world, runs), command="fit")
    for number, callback in enumerate(parts.trainer.callbacks):
        if isinstance(callback, StageCheckpoint):
            callback.every_seconds = 0
            parts.trainer.callbacks.insert(number, Stop(steps))
            break
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            parts.trainer.fit(parts.module, datamodule=parts.data)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from there on


def note_the_stage(monkeypatch, kind, method):
    """Which stage's clock ran at every call of the data module's method."""
    seen, original = [], getattr(kind, method)

    def noting(self, *arguments):
        seen.append(self.trainer.lightning_module.ledger.stage)
        return original(self, *arguments)

    monkeypatch.setattr(kind, method, noting)
    return seen


# 3 and 7: inside B1 and B2. 5: the first step of B2, resumed from the end of B1. 14: inside C, after a measurement of the subset.
@pytest.mark.parametrize("steps", [3, 5, 7, 14])
def test_a_run_that_was_cut_off_ends_bit_for_bit_like_one_that_was_not(bridge, world, tmp_path, steps, monkeypatch):
    whole, _, expected = bridge
    run_until(world, tmp_path, steps)
    on_the_clock = note_the_stage(monkeypatch, TokenDataModule, "unigram_entropy")
    folder = tmp_path / "tiny" / "default"
    assert RunRecord.read(folder).status == "interrupted"
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["path"] == f"resume-{steps - 1}.ckpt"
    assert fit(tiny.arguments(world, tmp_path)) == 0
    assert on_the_clock == [None]  # reading the whole held-out split is no training
    final = load_file(folder / "checkpoints" / "C" / "model.safetensors")
    for name, parameter in whole.module.model.decoder.named_parameters():
        assert torch.equal(final[name], parameter.detach()), name
    record = RunRecord.read(folder)
    for ours, theirs in zip(record.stages, expected.stages, strict=True):
        assert ours.spent.tokens == theirs.spent.tokens
        assert ours.spent.bytes == theirs.spent.bytes
        assert ours.train_loss_mean == theirs.train_loss_mean
        assert [v.nats_per_token for v in ours.validations] == [v.nats_per_token for v in theirs.validations]
        assert ours.damage == theirs.damage
    assert record.imported == expected.imported
    assert [p.inner_on for p in record.evaluations] == [p.inner_on for p in expected.evaluations]


def test_a_finished_run_is_left_alone_and_another_configuration_is_refused(world, tmp_path, capsys):
    assert fit(tiny.arguments(world, tmp_path, "--model.validation.every_share=0", steps=10)) == 0
    before = (tmp_path / "tiny" / "default" / "record.json").read_text()
    assert fit(tiny.arguments(world, tmp_path, "--model.validation.every_share=0", steps=10)) == 0
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "tiny" / "default" / "record.json").read_text() == before
    unfinished = json.loads(before) | {"status": "interrupted", "reason": "a test"}
    (tmp_path / "tiny" / "default" / "record.json").write_text(json.dumps(unfinished))
    with pytest.raises(ValueError, match=r"another configuration \(model\.inner\.lr differ\)"):
        fit(tiny.arguments(world, tmp_path, "--model.validation.every_share=0", "--model.inner.lr=0.5", steps=10))


def test_a_narrower_window_is_a_reported_jump_and_carry_all_keeps_the_optimiser(world, tmp_path):
    stages = ['--model.stages.B1={"enabled": true, "share": 0.2, "window_share": 0.25}']
    stages += ['--model.stages.B2={"enabled": true, "share": 0.3, "carry": "all"}']
    parts = run(world, tmp_path, *stages, steps=10)
    b1, b2, c = RunRecord.read(parts.run.folder).stages
    assert b1.windows == [4] * 4
    assert not b1.transition.preserves
    assert b1.transition.before != b1.transition.after
    assert not b2.transition.preserves  # and wider again
    steps = {
        name: load_file(parts.run.folder / "checkpoints" / f"{name}.optimizer.safetensors")["embed_tokens.weight.step"]
        for name in ("B1", "B2", "C")
    }
    assert {name: int(step) for name, step in steps.items()} == {"B1": 2, "B2": 5, "C": 5}


class Overrun(L.Callback):
    """Optimiser steps of each stage that began after its time was over."""

    def __init__(self):
        self.late = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        name = module.plan.name
        starts = module.ledger.spent(name).micro_batches % module.plan.accumulate == 0
        self.late[name] = self.late.get(name, 0) + (starts and module.is_spent(module.plan))


def test_gpu_hours_end_each_stage_at_an_optimiser_step(world, tmp_path):
    overrun = Overrun()
    parts = run(world, tmp_path, "--model.budget.tokens=null", "--model.budget.gpu_hours=0.0012", callbacks=[overrun])
    assert set(overrun.late) == {"B1", "B2", "C"}
    assert max(overrun.late.values()) <= 1  # read ahead by one micro-batch
    record = RunRecord.read(parts.run.folder)
    for stage in record.stages:
        assert stage.spent.gpu_seconds["compute"] >= stage.planned.gpu_seconds
        assert stage.spent.tokens == stage.spent.optimizer_steps * 128
        assert stage.spent.micro_batches == stage.spent.optimizer_steps * 2
        assert len(stage.validations) == 2
    assert sum(stage.planned.gpu_seconds for stage in record.stages) == pytest.approx(0.0012 * 3600)


def test_divergence_stops_the_run_and_says_where(world, tmp_path):
    arguments = tiny.arguments(world, tmp_path, "--model.inner.lr=1e30", "--model.inner.clip=0", steps=20)
    with pytest.raises(RuntimeError, match=r"stage B2, step \d+: .*last good checkpoint is .*checkpoints/B1\."):
        fit(arguments)
    record = RunRecord.read(tmp_path / "tiny" / "default")
    assert record.status == "diverged"
    assert "stage B2" in record.reason
    with pytest.raises(ValueError, match="this run diverged"):
        fit(arguments)


def test_a_setting_without_limit_fits_into_the_record(world, tmp_path):
    parts = run(world, tmp_path, "--model.engine.residual_gib=.inf", steps=10)
    record = RunRecord.read(parts.run.folder)
    assert record.status == "finished"
    assert record.config["model"]["engine"]["residual_gib"] == ".inf"


def test_load_all_continues_with_the_optimiser_of_a_finished_stage(bridge, world, tmp_path):
    parts, _, _ = bridge
    start = parts.run.folder / "checkpoints" / "B2"
    only_c = ['--model.stages.B1={"enabled": false}', '--model.stages.B2={"enabled": false}']
    carry = ['--model.stages.C={"enabled": true, "carry": "all"}', "--model.start.load=all"]
    source = [f"--model.start.init_from={start}"]
    shapes = Shapes()
    again = run(world, tmp_path, *only_c, *carry, *source, steps=2, callbacks=[shapes])
    saved = load_file(str(start) + ".optimizer.safetensors")
    for name, state in shapes.moments["C"].items():
        for part, value in state.items():
            assert torch.equal(value, saved[f"{name}.{part}"]), (name, part)
    before, (parent,) = RunRecord.read(parts.run.folder), RunRecord.read(again.run.folder).parents
    assert (parent.name, parent.stage) == ("tiny/default", "B2")
    last_step, whole = (
        before.stages[1].train_gpu_seconds[-1],
        sum(stage.spent.gpu_seconds["compute"] for stage in before.stages[:2]),
    )
    assert last_step <= parent.gpu_seconds <= whole + 0.001
    assert parent.tokens == sum(stage.spent.tokens for stage in before.stages[:2])


def test_a_run_from_a_narrower_stage_gets_the_window_it_asks_for(world, tmp_path):
    """The checkpoint of a stage has the stage's window; a later run's stages come from the imported model's."""
    first = [
        '--model.stages.B1={"enabled": true, "share": null, "window_share": 0.25}',
        '--model.stages.B2={"enabled": false}',
    ]
    narrow = run(world, tmp_path, *first, '--model.stages.C={"enabled": false}', "--run.id=narrow", steps=2)
    start = f"--model.start.init_from={narrow.run.folder}/checkpoints/B1"
    second = ['--model.stages.B1={"enabled": false}', '--model.stages.C={"enabled": false}']
    share = '--model.stages.B2={"enabled": true, "share": null}'
    wide = run(world, tmp_path, *second, share, start, "--run.id=wide", steps=2)
    stage = RunRecord.read(wide.run.folder).stages[0]
    assert stage.windows == [16] * 4
    assert not stage.transition.preserves
    assert stage.transition.before != stage.transition.after


def test_a_scratch_run_has_no_parents_and_silent_prime_mlps(bridge, world, tmp_path):
    """Its shape may come from a TTT checkpoint; neither weights nor history do."""
    parts, _, _ = bridge
    source = [f"--model.start.init_from={parts.run.folder}/checkpoints/C", "--model.start.init=scratch"]
    record = RunRecord.read(run(world, tmp_path, *source, steps=10).run.folder)
    assert record.parents == []
    assert record.start.lineage == []
    assert record.start.source is None
    assert record.start.receipt["inherited"]["tensors"] == 0
    assert record.stages[1].transition.preserves  # B1 none → B2 meta: inserting the prime MLPs changed nothing


def test_a_checkpoint_with_other_ttt_layers_than_asked_for_is_refused(bridge, world, tmp_path):
    parts, _, _ = bridge
    start = f"--model.start.init_from={parts.run.folder}/checkpoints/C"
    with pytest.raises(ValueError, match=r"the checkpoint has TTT layers \[3\].*got layers \[1\]"):
        run(world, tmp_path, start, '--model.ttt={"layers": [1]}')


def test_a_first_start_that_fails_leaves_the_run_id_free(world, tmp_path):
    with pytest.raises(FileNotFoundError):
        fit(tiny.arguments(world, tmp_path, "--model.start.init_from=nowhere", steps=10))
    assert not (tmp_path / "tiny" / "default").exists()
    assert fit(tiny.arguments(world, tmp_path, "--model.validation.every_share=0", steps=10)) == 0


class Fails(L.Callback):
    def on_train_epoch_end(self, trainer, module):
        if module.plan.name == "C":
            raise OSError("disk full")


def test_a_run_that_was_lost_after_its_last_save_is_finished_by_a_second_start(world, tmp_path):
    with pytest.raises(OSError, match="disk full"):
        run(world, tmp_path, steps=10, callbacks=[Fails()])
    folder = tmp_path / "tiny" / "default"
    assert RunRecord.read(folder).status == "failed"
    assert fit(tiny.arguments(world, tmp_path, steps=10)) == 0
    record = RunRecord.read(folder)
    assert record.status == "finished"
    assert record.totals.tokens == 10 * 128
