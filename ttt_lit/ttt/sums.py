"""Gradients of parameters, summed over chunks."""

from __future__ import annotations

import torch
from torch import Tensor

Key = tuple[int | None, str]
"""(layer, name in the block) of a parameter; layer None: the final norm and the head."""
HEAD: Key = (None, "head")


class GradientSums:
    """One running sum per parameter, in the dtype of what is added (float32 in training)."""

    def __init__(self) -> None:
        self._sums: dict[Key, Tensor] = {}

    def add(self, key: Key, gradient: Tensor | None) -> None:
        """Add a gradient, which may be kept and changed; None: no contribution."""
        if gradient is None:
            return
        if key in self._sums:
            self._sums[key] += gradient
        else:
            self._sums[key] = gradient

    def running(self, key: Key, like: Tensor) -> Tensor:
        """The sum itself, float32 at least, for a caller that adds to it in place: a head is too large for temporaries."""
        if key not in self._sums:
            self._sums[key] = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
        return self._sums[key]

    def get(self, key: Key) -> Tensor | None:
        return self._sums.get(key)
