"""What identifies a file and a tokenizer, for everyone who compares them. Standard library only."""

from __future__ import annotations

import hashlib
from pathlib import Path

FAST_FILE = "tokenizer.json"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
DEFINING_FILES = (FAST_FILE, *SENTENCEPIECE_FILES)
"""Files that decide a tokenizer's tokens; the first one present does."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file (hex), read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(folder: Path) -> str | None:
    """SHA-256 (hex) of the file that decides the tokens; None where a folder holds no tokenizer."""
    for name in DEFINING_FILES:
        if (folder / name).is_file():
            return hash_file(folder / name)
    return None
