"""What others see of a run while it trains: how far it is, and that nobody else may train it or touch its files."""

from pathlib import Path

import lightning as L
import pytest
import tiny
from fitting import run

from callbacks.heartbeat import Heartbeat
from ttt_lit.record.progress import Progress
from ttt_lit.train import run as run_module
from ttt_lit.train.lock import holder
from ttt_lit.train.run import assemble, fit


class Look(L.Callback):
    """Reads the heartbeat as another process would, after every optimiser step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            self.seen.append(Progress.read(trainer.default_root_dir))


def heartbeat(parts):
    return next(one for one in parts.trainer.callbacks if isinstance(one, Heartbeat))


def test_progress_follows_every_step_to_the_end(world, tmp_path):
    look = Look()
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    heartbeat(parts).every_seconds = 0
    parts.trainer.callbacks.append(look)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert [one.tokens for one in look.seen] == [128 * step for step in range(1, 11)]
    assert [one.stage for one in look.seen] == ["B1"] * 2 + ["B2"] * 3 + ["C"] * 5
    assert [one.fraction for one in look.seen] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(one.planned_tokens == 1280 and one.planned_gpu_seconds is None for one in look.seen)
    assert look.seen[-1].loss == pytest.approx(parts.module.report.loss)
    assert look.seen[4].remaining_seconds == pytest.approx(look.seen[4].gpu_seconds)
    assert Progress.read(parts.run.folder).fraction == 1


def test_a_budget_in_time_is_reported_in_time(world, tmp_path):
    parts = run(world, tmp_path, "--model.budget.tokens=null", "--model.budget.gpu_hours=0.0006")
    last = Progress.read(parts.run.folder)
    assert last.planned_tokens is None
    assert last.planned_gpu_seconds == pytest.approx(0.0006 * 3600)
    assert last.fraction == 1
    assert last.gpu_seconds >= last.planned_gpu_seconds


def test_between_stage_ends_heartbeats_are_no_closer_than_asked_for(world, tmp_path):
    look = Look()
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    heartbeat(parts).every_seconds = 3600
    parts.trainer.callbacks.append(look)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert [one.step for one in look.seen] == [1, 1, 2, 2, 2, 5, 5, 5, 5, 5]


class Rival(L.Callback):
    """Looks at every hook whether the run is locked, and starts it a second time before it has a record."""

    def __init__(self, arguments):
        self.arguments, self.holders, self.left = arguments, [], None

    def setup(self, trainer, module, stage):
        self._look(trainer)
        before = contents(trainer.default_root_dir)
        with pytest.raises(RuntimeError, match="this run is being trained by process"):
            fit([*self.arguments, "--model.optim.weight_decay=0.5"])  # another configuration: it would be written
        self.left = contents(trainer.default_root_dir) == before

    def on_train_batch_end(self, trainer, *_):
        self._look(trainer)

    def on_train_end(self, trainer, *_):
        self._look(trainer)

    def teardown(self, trainer, module, stage):
        self._look(trainer)

    def _look(self, trainer):
        self.holders.append(holder(trainer.default_root_dir))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def with_callback(monkeypatch, callback):
    """The next start has one callback more; those after it do not."""

    def assemble_once(arguments, *, command):
        monkeypatch.undo()
        parts = assemble(arguments, command=command)
        parts.trainer.callbacks.append(callback)
        return parts

    monkeypatch.setattr(run_module, "assemble", assemble_once)


def test_a_run_is_locked_from_its_first_file_to_its_end_and_a_second_start_touches_nothing(
    world, tmp_path, monkeypatch
):
    arguments = tiny.arguments(world, tmp_path, steps=10)
    rival = Rival(arguments)
    with_callback(monkeypatch, rival)
    assert fit(arguments) == 0
    assert rival.left
    assert all(rival.holders)
    assert holder(tmp_path / "tiny" / "default") is None


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        raise RuntimeError("the device is gone")


def test_a_run_that_breaks_gives_its_lock_back_and_keeps_its_files(world, tmp_path, monkeypatch):
    with_callback(monkeypatch, Fails())
    with pytest.raises(RuntimeError, match="the device is gone"):
        fit(tiny.arguments(world, tmp_path, steps=10))
    folder = tmp_path / "tiny" / "default"
    assert holder(folder) is None
    assert {"record.json", "config.yaml"} <= contents(folder).keys()
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_start_that_is_refused_leaves_no_trace(world, tmp_path):
    nowhere = tiny.arguments(world, tmp_path, "--model.start.init_from=nowhere")
    with pytest.raises(FileNotFoundError):
        fit(nowhere)
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "tiny" / "default"
    folder.mkdir(parents=True)
    for name in ("log.txt", "config.yaml", "events.out.tfevents.1"):
        (folder / name).write_text("name: was there")
    before = contents(folder)
    with pytest.raises(FileNotFoundError):
        fit(nowhere)
    assert contents(folder) == before
