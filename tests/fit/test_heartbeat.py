"""What others see of a run while it trains: how far it is, and that nobody else may train it."""

import lightning as L
import pytest
import tiny
from fitting import run

from callbacks.heartbeat import Heartbeat
from ttt_lit.train.lock import RunLock, holder
from ttt_lit.experiment.launch.progress import Progress
from ttt_lit.train.run import assemble, fit


class Look(L.Callback):
    """Reads the heartbeat as another process would, after every optimiser step."""

    def __init__(self):
        self.seen, self.holders = [], set()

    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            self.seen.append(Progress.read(trainer.default_root_dir))
            self.holders.add(holder(trainer.default_root_dir))


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
    assert None not in look.holders
    assert holder(parts.run.folder) is None
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


def test_a_run_that_another_process_trains_is_refused_and_left_as_it_is(world, tmp_path):
    folder = tmp_path / "tiny" / "default"
    other = RunLock(folder)
    other.acquire()
    with pytest.raises(RuntimeError, match="this run is being trained by process"):
        fit(tiny.arguments(world, tmp_path, steps=10))
    assert not (folder / "record.json").exists()
    assert holder(folder) is not None
    other.release()
    assert fit(tiny.arguments(world, tmp_path, steps=10)) == 0


def test_a_start_that_is_refused_leaves_no_lock(world, tmp_path):
    with pytest.raises(FileNotFoundError):
        fit(tiny.arguments(world, tmp_path, "--model.start.init_from=nowhere"))
    assert not (tmp_path / "tiny" / "default").exists()
