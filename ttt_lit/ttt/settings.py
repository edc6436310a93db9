"""How the meta-gradient is computed: what is kept, what is computed again, what is compiled. Nothing here changes a result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

FastWeightStorage = Literal["every", "factors", "two_level", "offload"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Memory against computation. All settings give the same gradient up to rounding."""

    recompute_blocks: bool = True
    """Keep of every block that reads whole sequences its input alone, and run it again in the backward. ``false``: keep its graph."""
    fast_weights: FastWeightStorage = "every"
    """How the fast weights of all chunks are kept for the backward. ``every``: each chunk's copy. ``factors``: the updates as factors,
    undone backwards. ``two_level``: a copy every sqrt(chunks) chunks, the steps between taken again. ``offload``: each chunk's copy in host
    memory."""
    residual_gib: float = 0.0
    """GiB on each device for results of the suffix's matrix products; the rest is computed again. ``.inf`` keeps all."""
    compile: bool | None = None
    """Whether ``torch.compile`` builds the layers' functions. null: on CUDA yes, elsewhere no. Without a compiler there is one warning, and
    nothing is compiled. Its time has an account of its own."""

    def __post_init__(self) -> None:
        if self.fast_weights not in get_args(FastWeightStorage):
            raise ValueError(
                f"engine.fast_weights: got {self.fast_weights!r}, expected one of {', '.join(get_args(FastWeightStorage))}"
            )
        if not self.residual_gib >= 0 or math.isnan(self.residual_gib):
            raise ValueError(f"engine.residual_gib: got {self.residual_gib}, expected at least 0 (.inf keeps all)")

    @property
    def residual_bytes(self) -> float:
        return self.residual_gib * 2**30


KEEP_ALL = EngineConfig(recompute_blocks=False, residual_gib=math.inf)
"""Nothing is computed twice."""
