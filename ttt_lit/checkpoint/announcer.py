"""Says what a long command is doing, in plain lines: a log file shows what a terminal does."""

from __future__ import annotations

import time

from rich.console import Console

EVERY_SECONDS = 10.0
"""Wall-clock time between two lines of one step."""


class Announcer:
    """Prints each step as it begins, and how far a long one has come every few seconds.

    Args:
        console: where the lines go; they are flushed one by one.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._last = time.monotonic()

    def step(self, text: str) -> None:
        """A step begins."""
        self._print(text)

    def progress(self, text: str) -> None:
        """A step goes on; printed only where nothing has been for a while."""
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._print(text)

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(
            f"[{self._last - self._began:4.0f} s] {text}", markup=False, highlight=False, soft_wrap=True
        )
