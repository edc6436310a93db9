"""In which order blocks are read: a function of (seed, stage) and a position, without state.

A pass takes every block once: shards in random order, then blocks in random order inside groups of shards, so that few
shards are open at a time. When a stage needs more blocks than exist, the next pass has another permutation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

SHARDS_PER_GROUP = 8
GROUPS_IN_MEMORY = 4


class SpreadOrder:
    """``wanted`` of the blocks, evenly spread and in order: validation. A prefix would be a few long documents."""

    def __init__(self, num_blocks: int, wanted: int) -> None:
        self.num_blocks, self.wanted = num_blocks, wanted

    def __call__(self, position: int) -> int:
        if not 0 <= position < self.wanted:
            raise IndexError(f"block {position} of {self.wanted}")
        return position * self.num_blocks // self.wanted


class ShuffledOrder:
    """Position ≥ 0 → block. Endless; position // num_blocks is the pass."""

    def __init__(self, first_blocks: np.ndarray, *, seed: int, stage: int) -> None:
        """``first_blocks``, (shards + 1,): the first block that begins in each shard, then the number of blocks."""
        self.first_blocks = first_blocks
        self.num_blocks = int(first_blocks[-1])
        self.seed, self.stage = seed, stage
        self._prepare_caches()

    def __call__(self, position: int) -> int:
        number, within = divmod(position, self.num_blocks)
        _, ends = self._groups(number)
        group = int(np.searchsorted(ends, within, side="right"))
        begin = int(ends[group - 1]) if group else 0
        return int(self._group(number, group)[within - begin])

    def _groups_of_pass(self, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shards of each group, and the position in the pass at which each group ends."""
        shards = self._generator(number, 0).permutation(len(self.first_blocks) - 1)
        groups = [shards[start : start + SHARDS_PER_GROUP] for start in range(0, len(shards), SHARDS_PER_GROUP)]
        sizes = [int((self.first_blocks[group + 1] - self.first_blocks[group]).sum()) for group in groups]
        return groups, np.cumsum(sizes)

    def _blocks_of_group(self, number: int, group: int) -> np.ndarray:
        shards = self._groups(number)[0][group]
        blocks = np.concatenate([np.arange(self.first_blocks[shard], self.first_blocks[shard + 1]) for shard in shards])
        return self._generator(number, 1 + group).permutation(blocks)

    def _generator(self, number: int, part: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.stage, number, part]))

    def _prepare_caches(self) -> None:
        self._groups: Callable[[int], tuple[list[np.ndarray], np.ndarray]] = lru_cache(2)(self._groups_of_pass)
        self._group: Callable[[int, int], np.ndarray] = lru_cache(GROUPS_IN_MEMORY)(self._blocks_of_group)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_groups", "_group")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare_caches()


def first_blocks(shard_starts: np.ndarray, text_tokens: int) -> np.ndarray:
    """(shards + 1,): the first block of ``text_tokens`` tokens of the shards that begins in each shard. A block that
    crosses a boundary belongs to the shard of its first token."""
    num_blocks = int(shard_starts[-1]) // text_tokens
    return np.minimum(-(-shard_starts // text_tokens), num_blocks)
