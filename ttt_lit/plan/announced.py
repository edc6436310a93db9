"""A line on stderr about what takes long, and none about what does not. Standard library only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def announced(text: str, *, after_seconds: float = 2.0) -> Iterator[None]:
    """Print ``text`` once if the body is still at work after so many seconds."""
    timer = threading.Timer(after_seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
