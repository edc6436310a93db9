"""Books the time that torch.compile takes on an account of its own, wherever compilation happens."""

from __future__ import annotations

from typing import Any

import torch._dynamo.callback as dynamo

from ttt_lit.metrics import Account
from ttt_lit.train.ledger import Ledger


class CompileClock:
    """While attached, the ledger's clock runs on ``compile`` from the start of a compilation to its end, the backward's included."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._previous: Account | None = None
        handler = dynamo.callback_handler
        handler.register_start_callback(self._begin)
        handler.register_end_callback(self._end)

    def detach(self) -> None:
        """Leave torch as it was."""
        handler = dynamo.callback_handler
        handler.remove_start_callback(self._begin)
        handler.remove_end_callback(self._end)

    def _begin(self, _: Any) -> None:
        if self._ledger.stage is not None:
            self._previous = self._ledger.switch("compile")

    def _end(self, _: Any) -> None:
        if self._previous is not None and self._ledger.stage is not None:
            self._ledger.switch(self._previous)
        self._previous = None
