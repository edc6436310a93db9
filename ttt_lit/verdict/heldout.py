"""How many held-out blocks stand behind a loss: few for the series while training, all for the final one. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from ttt_lit.record.schema import RunRecord
from ttt_lit.verdict.formats import NONE

FEW_BLOCKS = 8
"""Blocks below which the third decimal of a mean over them says nothing."""


def subset_blocks(record: RunRecord) -> int | None:
    """Blocks of the fixed subset that the series is measured on; None: the record's configuration does not say."""
    found: object = record.config
    for key in ("model", "validation", "subset"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if type(found) is int and found > 0 else None


def final_blocks(record: RunRecord) -> int | None:
    """Blocks of the validation that speaks for the run; None where it was not measured."""
    final = record.final()
    return None if final is None else final.blocks


def final_bytes(records: Iterable[RunRecord]) -> str:
    """Bytes of text in the blocks of the final validation, ``73,812``; several where runs differ, a dash where none was measured."""
    counts = sorted({final.bytes for record in records if (final := record.final()) is not None})
    return " or ".join(f"{each:,}" for each in counts) or NONE


def block_words(counts: Iterable[int | None]) -> str:
    """``2 held-out blocks``, ``2 to 4 held-out blocks``, or that the number was not recorded. None in ``counts``: of a run, not known."""
    known = sorted({count for count in counts if count is not None})
    if not known:
        return "held-out blocks whose number was not recorded"
    if len(known) > 1:
        return f"{known[0]} to {known[-1]} held-out blocks"
    return "1 held-out block" if known == [1] else f"{known[0]} held-out blocks"


def subset_words(records: Iterable[RunRecord]) -> str:
    """Of the runs that have a series."""
    return block_words(subset_blocks(record) for record in records if record.evaluations)


def final_words(records: Iterable[RunRecord]) -> str:
    return block_words(map(final_blocks, records))


def subset_loss(loss: float, records: Iterable[RunRecord]) -> str:
    """A loss on the subset in as many digits as its blocks carry: two, or three from ``FEW_BLOCKS`` blocks on."""
    counts = [subset_blocks(record) for record in records]
    enough = bool(counts) and all(count is not None and count >= FEW_BLOCKS for count in counts)
    return f"{loss:.{3 if enough else 2}f}"
