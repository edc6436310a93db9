"""A run that is told to go: it saves at the next optimiser step, says interrupted, and ends as if nobody had told it anything."""

import json
import multiprocessing
import os
import signal
import subprocess

import lightning as L
import pytest
import tiny
import torch
from safetensors.torch import load_file

from callbacks.stage_checkpoint import StageCheckpoint
from ttt_lit.data.stream import STOP_SIGNALS
from ttt_lit.record.schema import RunRecord
from ttt_lit.train.resume import resume_file
from ttt_lit.train.run import assemble, fit


class Tell(L.Callback):
    """Sends a signal to this process after a number of micro-batches, as a launcher stops a run: its workers hear it too, and first."""

    def __init__(self, number, after):
        self.number, self.after, self.seen, self.told = number, after, 0, 0

    def on_train_batch_start(self, *_):
        self.seen += 1
        if self.seen == self.after:
            workers = multiprocessing.active_children()
            self.told = len(workers)
            # By another process, which is not the workers' parent.
            told = [str(process) for process in (*(worker.pid for worker in workers), os.getpid())]
            subprocess.run(["kill", "-s", str(int(self.number)), *told], check=True)


@pytest.fixture(autouse=True)
def _handlers():
    """Whatever a run makes of the handlers, the tests after it have their own."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _workers():
    """No worker stays, whatever a run makes of it."""
    yield
    left = multiprocessing.active_children()
    for worker in left:
        worker.kill()
        worker.join()
    assert not left


def told(world, runs, number, after, workers=0):
    parts = assemble(tiny.arguments(world, runs, f"--data.num_workers={workers}"), command="fit")
    tell = Tell(number, after)
    parts.trainer.callbacks.append(tell)
    with pytest.raises(SystemExit):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    assert (tell.told > 0) == (workers > 0)  # a stage that has ended may still have its own
    return runs / "tiny" / "default"


# Two micro-batches a step; B1 has 4 steps. The first micro-batch of step 6, in B2, and the last one of B1.
@pytest.mark.parametrize("after, saved, workers", [(11, 6, 1), (8, 4, 0)])
def test_it_saves_at_the_next_step_and_then_ends_bit_for_bit_like_one_that_was_not(
    bridge, world, tmp_path, after, saved, workers
):
    whole, _, _ = bridge
    folder = told(world, tmp_path, signal.SIGTERM, after, workers)
    assert RunRecord.read(folder).status == "interrupted"
    assert json.loads((folder / "checkpoints" / "last.json").read_text())["path"] == f"resume-{saved}.ckpt"
    assert fit(tiny.arguments(world, tmp_path)) == 0
    final = load_file(folder / "checkpoints" / "C" / "model.safetensors")
    for name, parameter in whole.module.model.decoder.named_parameters():
        assert torch.equal(final[name], parameter.detach()), name


def test_the_first_ctrl_c_saves_and_the_second_does_not_wait(world, tmp_path, capfd, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")  # a person means it there too
    folder = told(world, tmp_path / "once", signal.SIGINT, 3)
    assert (RunRecord.read(folder).status, resume_file(folder).name) == ("interrupted", "resume-2.ckpt")
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parts = assemble(tiny.arguments(world, tmp_path / "twice"), command="fit")
    parts.trainer.callbacks.extend([Tell(signal.SIGINT, 3), Tell(signal.SIGINT, 3)])
    with pytest.raises(SystemExit):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    folder = tmp_path / "twice" / "tiny" / "default"
    assert (RunRecord.read(folder).reason, resume_file(folder)) == ("stopped at once by Ctrl-C", None)


def test_a_run_in_the_background_leaves_ctrl_c_ignored(world, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    parts.trainer.callbacks.append(Tell(signal.SIGINT, 3))
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert RunRecord.read(tmp_path / "tiny" / "default").status == "finished"


def test_a_warning_that_comes_too_late_to_matter_lets_the_run_finish(world, tmp_path):
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    parts.trainer.callbacks.append(Tell(signal.SIGTERM, 20))
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert RunRecord.read(tmp_path / "tiny" / "default").status == "finished"


def test_the_handler_of_the_clusters_warning_runs_once_everything_is_saved(world, tmp_path):
    """Under submitit that handler puts the job back into the queue and ends the process."""
    seen = []

    def requeue(number, _):
        folder = tmp_path / "tiny" / "default"
        seen.append((number, RunRecord.read(folder).status))

    signal.signal(signal.SIGUSR2, requeue)
    told(world, tmp_path, signal.SIGUSR2, 3)
    assert seen == [(signal.SIGUSR2, "interrupted")]
    assert signal.getsignal(signal.SIGUSR2) is requeue


def test_a_finished_run_gives_the_handlers_back(world, tmp_path):
    def mine(*_):
        raise AssertionError

    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGUSR2, mine)
    assert fit(tiny.arguments(world, tmp_path, steps=10)) == 0
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGUSR2) is mine


class Saved(L.Callback):
    """The name of the resume file after every optimiser step."""

    def __init__(self):
        self.names = []

    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            path = resume_file(trainer.default_root_dir)
            self.names.append(None if path is None else path.name)


def test_in_a_job_of_a_cluster_sigterm_saves_and_training_goes_on(world, tmp_path, monkeypatch):
    """The cluster's warning follows, or the end; submitit ignores SIGTERM for the same reason."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    saved = Saved()
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    parts.trainer.callbacks.extend([Tell(signal.SIGTERM, 13), saved])
    parts.trainer.fit(parts.module, datamodule=parts.data)
    assert saved.names[5:9] == ["resume-5.ckpt", "resume-7.ckpt", "resume-7.ckpt", "resume-7.ckpt"]
    assert RunRecord.read(tmp_path / "tiny" / "default").status == "finished"


def test_a_step_is_saved_once_however_many_ask_for_it(world, tmp_path, monkeypatch):
    parts = assemble(tiny.arguments(world, tmp_path, steps=10), command="fit")
    (owner,) = (one for one in parts.trainer.callbacks if isinstance(one, StageCheckpoint))
    owner.every_seconds = 0
    parts.trainer.callbacks.append(Tell(signal.SIGTERM, 13))
    written, save = [], parts.trainer.save_checkpoint
    monkeypatch.setattr(
        parts.trainer, "save_checkpoint", lambda path, **others: (written.append(path.name), save(path, **others))
    )
    with pytest.raises(SystemExit):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    assert written == [f"resume-{step}.ckpt" for step in range(1, 8)]
