"""What stands beside the name of a run that is not finished. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

from ttt_lit.record.schema import RunRecord


def unfinished(records: Sequence[RunRecord]) -> str:
    """The statuses of runs that did not finish: ``running``, of several seeds ``failed, running (2 of 3 seeds)``; empty: all did."""
    open_runs = [record for record in records if record.status != "finished"]
    statuses = ", ".join(sorted({record.status for record in open_runs}))
    return f"{statuses} ({len(open_runs)} of {len(records)} seeds)" if open_runs and len(records) > 1 else statuses


def marked(name: str, records: Sequence[RunRecord]) -> str:
    """A name with that in brackets behind it."""
    status = unfinished(records)
    return f"{name} [{status}]" if status else name
