"""What a job of a cluster calls: ``fit``, in a way that survives preemption. Standard library only until it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any


class FitJob:
    """One run; every task of the job calls it with the same arguments.

    The cluster's warning (SIGUSR2) reaches submitit's handler, which asks ``checkpoint`` for the call that goes on and puts the job
    back into the queue. The callback ``Preemption`` delays that handler until the run's resume file is written.

    Args:
        entry: ``module:function`` that takes the arguments of ``fit``; imported on the node, not where the job is submitted.
        arguments: those of ``fit``.
    """

    def __init__(self, entry: str, arguments: Sequence[str]) -> None:
        self.entry, self.arguments = entry, tuple(arguments)

    def __call__(self) -> int:
        module, _, function = self.entry.partition(":")
        status: int = getattr(importlib.import_module(module), function)(list(self.arguments))
        return status

    def checkpoint(self) -> Any:
        """The same call again: ``fit`` continues from the run's last resume file by itself."""
        # Only submitit calls this, so it is there.
        helpers = importlib.import_module("submitit.helpers")
        return helpers.DelayedSubmission(self)
