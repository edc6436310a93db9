"""Ending the launcher: Ctrl-C, a closing terminal, nohup, and runs that do not stop."""

import os
import signal
import sys
import threading
import time

import pytest
from helpers.launching import ends, environment, local, starts, to_end

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
def told():
    """Signals that reached the handlers from before the launcher, which are as a foreground process has them.

    A shell's background, nohup and Lightning leave some of them ignored.
    """
    seen = []
    usual = dict.fromkeys((signal.SIGTERM, signal.SIGHUP), lambda got, _: seen.append(got))
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_runs_and_says_what_to_do(runs_of, capsys, number):
    runs = runs_of(ends("waits", "q_a", "q_b"))
    send_when(lambda: all((run.folder / "record.json").exists() for run in runs), number)
    assert to_end(runs, local(2), slots=2) == 130
    assert "the same command continues every run" in capsys.readouterr().err
    for run in runs:
        assert holder(run.folder) is None
        with pytest.raises(ProcessLookupError):
            os.kill(starts(run)[0]["pid"], 0)


def test_a_run_that_another_process_began_goes_on_after_ctrl_c_and_that_is_said(runs_of, capsys):
    (run,) = runs_of({"arms": ["q_a"]})
    lock = RunLock(run.folder)
    lock.acquire()
    backend = local()
    send_when(lambda: bool(backend._others), signal.SIGINT)
    assert to_end([run], backend) == 130
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
    assert (to_end([run], backend), stopped, told) == (130, [True], [])
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM]  # the handlers are back


def test_nohup_is_respected(runs_of):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    (run,) = runs_of(ends("waits", "q_a"))

    def hang_up_then_let_it_end():
        if (run.folder / "record.json").exists():
            os.kill(os.getpid(), signal.SIGHUP)
            (run.folder / "go").touch()
        return (run.folder / "go").exists()

    send_when(hang_up_then_let_it_end, signal.SIGHUP)
    assert to_end([run], local()) == 0


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
