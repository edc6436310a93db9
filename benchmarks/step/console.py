"""What the command prints while it measures."""

import sys


def say(message: str) -> None:
    """Progress: one line that is overwritten, or lines of a log."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    elif message:
        print(message, file=sys.stderr, flush=True)


def show(text: str) -> None:
    say("")
    print(text, flush=True)
