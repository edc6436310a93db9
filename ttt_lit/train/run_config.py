"""What a run is called, where its files go, and what it is in a comparison. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ttt_lit.record.schema import Role


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run's files go, ROOT/EXPERIMENT/ID/, and how a report reads it."""

    experiment: str
    """Name of the experiment; an experiment file sets it."""
    id: str = "default"
    """Name of this run; a second start with the same one continues it."""
    root: str = "runs"
    """Folder of all runs."""
    role: Role | None = None
    """What the run is in a comparison. ``ttt_scratch``: the baseline. ``bridge``, ``direct``: the candidates. ``fa_scratch``,
    ``fa_import``: full-attention controls. ``control``: any other control. ``external``: made the checkpoint that others start from. null:
    nothing in particular."""
    variant: str = ""
    """What an ablation changed, as ``axis=label`` separated by commas; the ``matrix`` command sets it."""
    share: float | None = None
    """Budget as a share of the baseline's GPU-hours; the ``matrix`` command sets it, with the budget itself. null: matched by tokens."""
    stage: str | None = None
    """For ``validate``: the stage whose attention and mode are used; null: the last one."""

    @property
    def folder(self) -> Path:
        return Path(self.root) / self.experiment / self.id
