"""How a run can stand, as its record says. Standard library only."""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["running", "finished", "diverged", "interrupted", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
ENDED: tuple[Status, ...] = ("finished", "diverged")
"""Runs that no start continues: they are complete, or going on would go wrong again."""
