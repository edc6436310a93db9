"""LitData shards of tokens: one writer, one reader, and the order in which blocks are read.

A shard is a LitData chunk with one item, its tokens as int32 without a header of their own. LitData writes the shards,
so its StreamingDataset can read them; we read them through a memory map: LitData drops each chunk's remainder modulo
the block, while the map serves any block size, across shards, and needs no threads.
"""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ttt_lit.data.manifest import ShardEntry, SplitEntry, remake
from ttt_lit.identity import hash_file

DTYPE = "int32"
MAX_SHARD_TOKENS = 2**29
"""LitData's offsets inside a chunk are 32-bit byte counts."""
OPEN_SHARDS = 64
"""Of all readers of a process together."""
SHARDS_PER_GROUP = 8
GROUPS_IN_MEMORY = 4
"""Of all orders of a process together."""
INSTALL_LITDATA = "pip install --no-deps litdata==0.2.76"
_IMPORT_ERRORS = (ImportError, RuntimeError, OSError)
_PIECE = 1 << 20
"""Tokens that are counted at once."""


def import_litdata() -> ModuleType:
    """LitData's streaming package. Raises ValueError with the way out if it, or a torchvision beside it, cannot be
    imported."""
    check_torchvision()
    try:
        return import_module("litdata.streaming")
    except _IMPORT_ERRORS as error:
        raise ValueError(
            f"litdata cannot be imported ({_first_line(error)}); {INSTALL_LITDATA} (its dependencies are already ours,"
            " torchvision is not wanted)"
        ) from error


def check_torchvision() -> None:
    """ValueError if an installed torchvision is broken: one built for another torch breaks its importers."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except _IMPORT_ERRORS as error:
        raise ValueError(
            f"torchvision is installed but broken ({_first_line(error)}); pip uninstall torchvision (nothing here needs it)"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def write_shard(
    folder: Path, split: str, number: int, tokens: np.ndarray, *, scratch: Path
) -> tuple[ShardEntry, dict[str, Any]]:
    """Write ``tokens`` as shard ``number`` of a split; returns its entry and LitData's description (chunk, config).

    LitData writes into ``scratch``, a folder on the same disk; the shard appears under its name when it is complete.
    """
    import torch

    streaming = import_litdata()
    target = folder / split
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        cache = streaming.Cache(
            temporary, chunk_size=len(tokens), item_loader=streaming.TokensLoader(), writer_chunk_index=number
        )
        cache[0] = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int32))
        (written,) = (Path(path) for path in cache.done())
        description = json.loads((Path(temporary) / "0.index.json").read_text())
        name = f"{split}/{written.name}"
        written.replace(folder / name)
    path = folder / name
    entry = ShardEntry(file=name, bytes=path.stat().st_size, sha256=hash_file(path), tokens=len(tokens))
    return entry, {"chunk": description["chunks"][0], "config": description["config"]}


def write_index(folder: Path, split: str, descriptions: list[dict[str, Any]], shard_tokens: int) -> None:
    """LitData's index.json of a split, without the time of day that LitData would put in."""
    config = descriptions[0]["config"] | {"chunk_size": shard_tokens}
    index = {"chunks": [one["chunk"] for one in descriptions], "config": config, "updated_at": "0"}
    (folder / split / "index.json").write_text(json.dumps(index, sort_keys=True))


class TokenReader:
    """Random access to the tokens of one split as one long array, shard after shard."""

    def __init__(self, folder: Path, entry: SplitEntry, vocab_size: int) -> None:
        self.folder, self.entry, self.vocab_size = folder, entry, vocab_size
        self.starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])
        """(shards + 1,) int64: position of each shard's first token, then the number of tokens."""

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) int64 tokens from position ``start``. Raises ValueError naming the shard if an id is not in the
        vocabulary."""
        pieces = []
        while count > 0:
            shard = int(np.searchsorted(self.starts, start, side="right")) - 1
            offset = start - int(self.starts[shard])
            piece = np.asarray(self._map(shard)[offset : offset + count], dtype=np.int64)
            if len(piece) == 0 or piece.min() < 0 or piece.max() >= self.vocab_size:
                path = self.folder / self.entry.shards[shard].file
                raise ValueError(
                    f"{path}: damaged or from another tokenizer, holds ids outside 0…{self.vocab_size - 1};"
                    f" {remake(self.folder)}"
                )
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def unigram_entropy(self) -> float:
        """Entropy in nats per token of the token frequencies: the loss of knowing those and nothing else, which a trained
        model must leave well behind."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        total = int(self.starts[-1])
        for start in range(0, total, _PIECE):
            counts += np.bincount(self.read(start, min(_PIECE, total - start)), minlength=self.vocab_size)
        share = counts[counts > 0] / total
        return float(-(share * np.log(share)).sum())

    @lru_cache(OPEN_SHARDS)  # noqa: B019 (bounded, so few readers are kept alive)
    def _map(self, shard: int) -> np.ndarray:
        entry = self.entry.shards[shard]
        path = self.folder / entry.file
        try:
            words = np.memmap(path, dtype=np.int32, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: missing or cut off since the start ({error}); {remake(self.folder)}") from error
        # One item per chunk: its number, then the byte offsets of its two ends, before the tokens.
        return words[3 : 3 + entry.tokens]


class ShuffledOrder:
    """Position ≥ 0 → block, a function of (seed, stage) without state. Endless; position // num_blocks is the pass.

    A pass takes every block once: shards in random order, then blocks in random order inside groups of shards, so that
    few shards are open at a time. The next pass has another permutation.
    """

    def __init__(self, first_blocks: np.ndarray, *, seed: int, stage: int) -> None:
        """``first_blocks``, (shards + 1,): the first block that begins in each shard, then the number of blocks."""
        self.first_blocks = first_blocks
        self.num_blocks = int(first_blocks[-1])
        self.seed, self.stage = seed, stage

    def __call__(self, position: int) -> int:
        number, within = divmod(position, self.num_blocks)
        _, ends = self._groups(number)
        group = int(np.searchsorted(ends, within, side="right"))
        begin = int(ends[group - 1]) if group else 0
        return int(self._blocks(number, group)[within - begin])

    @lru_cache(2)  # noqa: B019 (bounded, so few orders are kept alive)
    def _groups(self, number: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Shards of each group of a pass, and the position in the pass at which each group ends."""
        shards = self._generator(number, 0).permutation(len(self.first_blocks) - 1)
        groups = [shards[start : start + SHARDS_PER_GROUP] for start in range(0, len(shards), SHARDS_PER_GROUP)]
        sizes = [int((self.first_blocks[group + 1] - self.first_blocks[group]).sum()) for group in groups]
        return groups, np.cumsum(sizes)

    @lru_cache(GROUPS_IN_MEMORY)  # noqa: B019
    def _blocks(self, number: int, group: int) -> np.ndarray:
        shards = self._groups(number)[0][group]
        blocks = np.concatenate([np.arange(self.first_blocks[shard], self.first_blocks[shard + 1]) for shard in shards])
        return self._generator(number, 1 + group).permutation(blocks)

    def _generator(self, number: int, part: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.stage, number, part]))


def spread_block(num_blocks: int, wanted: int, position: int) -> int:
    """``wanted`` of the blocks, evenly spread and in order: validation. A prefix would be a few long documents."""
    return position * num_blocks // wanted


def first_blocks(shard_starts: np.ndarray, text_tokens: int) -> np.ndarray:
    """(shards + 1,): the first block of ``text_tokens`` tokens of the shards that begins in each shard. A block that
    crosses a boundary belongs to the shard of its first token."""
    num_blocks = int(shard_starts[-1]) // text_tokens
    return np.minimum(-(-shard_starts // text_tokens), num_blocks)
