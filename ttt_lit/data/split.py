"""The split rule: a document's side depends on its text alone.

Every data set of one corpus, short or long, and the tokenizer trained on it, share the split; duplicates stand on the
same side.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from ttt_lit.data.corpus import Document

SALT = "ttt_lit split 1\n"
"""Part of the rule, not a setting: two data sets with different salts would mix train and validation documents."""

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def split_of(document: Document, validation_fraction: float) -> Split:
    """The first 8 bytes of SHA-256(salt + text), as a fraction of 2^64, against ``validation_fraction``."""
    digest = hashlib.sha256((SALT + document.text).encode()).digest()
    return "validation" if int.from_bytes(digest[:8]) < validation_fraction * 2**64 else "train"


def split_rule(validation_fraction: float) -> str:
    """The rule in words, for manifests; two data sets share a split exactly if these are equal."""
    return f"validation if the first 8 bytes of SHA-256({SALT!r} + text) < {validation_fraction!r} * 2**64, else train"
