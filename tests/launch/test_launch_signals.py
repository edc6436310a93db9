"""Ending the launcher: Ctrl-C, a closing terminal, nohup, and runs that do not stop."""

import os
import signal
import sys
import threading
import time

import pytest
from helpers.launching import ends, environment, local, starts
from rich.console import Console

from ttt_lit.launch import command
from ttt_lit.launch.local import LocalBackend
from ttt_lit.train.lock import RunLock, holder


def send_when(condition, number):
    """From another thread, as a terminal would; gives up after a while so that a defect fails and does not hang."""

    def wait():
        for _ in range(1000):
            if condition():
                break
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """Signals as a foreground process has them: a shell's background, nohup and Lightning leave some of them ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told():
    """Signals that reached the handlers from before the launcher."""
    seen = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda got, _: seen.append(got))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_runs_and_says_what_to_do(runs_of, capsys, number):
    runs = runs_of(ends("waits", "q_a", "q_b"))
    send_when(lambda: all((run.folder / "record.json").exists() for run in runs), number)
    console = Console(force_terminal=False)
    status = command.run_to_end("m", runs, local(2), slots=2, console=console, poll_seconds=0.01)
    assert status == 130
    assert "the same command continues every run" in capsys.readouterr().err
    for run in runs:
        assert holder(run.folder) is None
        with pytest.raises(ProcessLookupError):
            os.kill(starts(run)[0]["pid"], 0)


def test_a_run_that_another_process_began_goes_on_after_ctrl_c_and_that_is_said(runs_of, capsys):
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    lock.acquire()
    backend, looked = local(), []
    state = backend.state

    def state_of(one):
        looked.append(one)
        return state(one)

    backend.state = state_of
    send_when(lambda: bool(looked), signal.SIGINT)
    console = Console(force_terminal=False)
    assert command.run_to_end("m", [run], backend, slots=1, console=console, poll_seconds=0.01) == 130
    assert "q_a/m go on: another process began them" in capsys.readouterr().err
    lock.release()


def test_a_closing_terminal_may_say_so_twice_while_runs_stop(runs_of, told):
    """A second interruption would kill them before they have saved."""
    (run,) = runs_of(ends("waits", "q_a"))
    backend, stopped = local(), []
    stop = backend.stop

    def stop_told_again():
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        stop()
        stopped.append(True)

    backend.stop = stop_told_again
    send_when(lambda: (run.folder / "record.json").exists(), signal.SIGHUP)
    status = command.run_to_end("m", [run], backend, slots=1, console=Console(force_terminal=False), poll_seconds=0.01)
    assert (status, stopped, told) == (130, [True], [])
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM]  # the handlers are back


def test_nohup_is_respected(runs_of, told):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    (run,) = runs_of(ends("waits", "q_a"))

    def hang_up_then_let_it_end():
        if (run.folder / "record.json").exists():
            os.kill(os.getpid(), signal.SIGHUP)
            (run.folder / "go").touch()
        return (run.folder / "go").exists()

    send_when(hang_up_then_let_it_end, signal.SIGHUP)
    status = command.run_to_end("m", [run], local(), slots=1, console=Console(force_terminal=False), poll_seconds=0.01)
    assert status == 0


def test_a_run_that_does_not_stop_is_killed(tmp_path, runs_of):
    (run,) = runs_of({"arms": ["q_a"]})
    deaf = "import signal, pathlib, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf += f"; pathlib.Path({str(tmp_path / 'deaf')!r}).touch(); time.sleep(600)"
    backend = LocalBackend((sys.executable, "-c", deaf), [environment()], grace_seconds=0.1)
    backend.start(run, ())
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    ((process, _),) = backend._jobs.values()
    backend.stop()
    assert process.returncode == -signal.SIGKILL
