"""Processes that read ahead: the same batches, deaf to what a run is told, gone with the run."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from helpers.tokens import indices, request

import ttt_lit.data.shards as shards_module
import ttt_lit.data.stream as stream_module
from ttt_lit.data.stream import STOP_SIGNALS, TokenDataModule

# On one core torch finds any number of workers excessive.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def test_a_worker_reads_on_whatever_the_run_is_told_and_ends_when_the_run_ends_it(packed):
    stream = iter(TokenDataModule(short=str(packed), num_workers=1).open(request()))
    read = [next(stream)["index"].tolist()]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        subprocess.run(
            ["kill", "-s", str(int(number)), str(worker.pid)], check=True
        )  # by a process that is not its parent
    assert read + indices(stream) == indices(TokenDataModule(short=str(packed)).open(request()))
    stream = iter(TokenDataModule(short=str(packed), num_workers=1).open(request()))
    next(stream)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(20)
    ended = worker.exitcode
    worker.kill()  # one that has not would keep this process from ending
    assert ended == 0


def test_a_worker_is_born_deaf_and_the_run_hears_again(module, monkeypatch):
    def deaf_to():
        return signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)

    born, batches = [], stream_module.DataLoader.__iter__

    def start(loader):
        born.append(deaf_to())
        return batches(loader)

    monkeypatch.setattr(stream_module.DataLoader, "__iter__", start)
    module.num_workers = 1
    assert len(indices(module.open(request(num_batches=1)))) == 1
    assert born == [set(STOP_SIGNALS)]
    assert deaf_to() == set()


def _run_with_a_stuck_worker(folder, writer):
    def read(*_):
        writer.send(os.getpid())
        time.sleep(600)

    shards_module.TokenReader.read = read
    next(iter(TokenDataModule(short=str(folder), num_workers=1).open(request())))


def test_no_worker_survives_a_run_that_is_killed(packed):
    """Not even one that waits for a disk: it holds a copy of the run's lock."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    run = multiprocessing.get_context("fork").Process(target=_run_with_a_stuck_worker, args=(packed, writer))
    run.start()
    writer.close()
    worker = reader.recv()
    run.kill()
    run.join()
    try:
        assert reader.poll(20)  # the end of the pipe: nobody is left who could write
        with pytest.raises(EOFError):
            reader.recv()
    except BaseException:
        os.kill(worker, signal.SIGKILL)
        raise
