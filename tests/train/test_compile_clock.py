"""Compilation is on an account of its own, and torch is left as it was."""

import pytest
import torch
import torch._dynamo.callback as dynamo

from ttt_lit.train.compile_clock import CompileClock
from ttt_lit.train.ledger import Ledger


@pytest.fixture
def ledger():
    """A clock that moves by a second whenever it is looked at."""
    ticks = iter(range(10**6))
    ledger = Ledger(clock=lambda: float(next(ticks)))
    ledger.start_stage("C")
    yield ledger
    torch._dynamo.reset()


def registered():
    handler = dynamo.callback_handler
    return len(handler.start_callbacks), len(handler.end_callbacks)


def test_time_of_a_compilation_is_booked_on_compile_and_what_follows_on_the_account_before(ledger):
    clock = CompileClock(ledger)
    with ledger.account("validation"):
        torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.ones(2))
        booked = ledger.spent("C").gpu_seconds
        assert booked["compile"] > 0
        ledger.spent("C")
    clock.detach()
    after = ledger.spent("C").gpu_seconds
    assert after["compile"] == booked["compile"]
    assert after["validation"] > booked["validation"]


def test_detached_it_hears_nothing(ledger):
    before = registered()
    CompileClock(ledger).detach()
    assert registered() == before
    torch.compile(lambda x: x.cos() - 1, backend="eager")(torch.ones(2))
    assert ledger.spent("C").gpu_seconds["compile"] == 0


def test_a_compilation_outside_of_stages_is_on_no_account():
    ledger = Ledger()
    clock = CompileClock(ledger)
    torch.compile(lambda x: x.exp() * 2, backend="eager")(torch.ones(2))
    clock.detach()
    assert ledger.total().gpu_seconds["compile"] == 0
