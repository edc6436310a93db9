"""LitData shards of tokens: one writer, one reader.

A shard is a LitData chunk with one item, its tokens as int32 without a header of their own. LitData writes the shards,
so its StreamingDataset can read them; we read them through a memory map: LitData drops each chunk's remainder modulo
the block, while the map serves any block size, across shards, and needs no threads.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
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
INSTALL_LITDATA = "pip install --no-deps litdata==0.2.76"


def import_litdata() -> ModuleType:
    """LitData's streaming package. Raises ValueError with the way out if it, or a torchvision beside it, cannot be
    imported."""
    if find_spec("litdata") is None:
        raise ValueError(
            f"litdata is not installed: {INSTALL_LITDATA} (its dependencies are already ours, torchvision is not"
            " wanted)"
        )
    try:
        return import_module("litdata.streaming")
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        broken = torchvision_problem()
        if broken is not None:
            raise ValueError(
                f"litdata cannot be imported: {broken}; pip uninstall torchvision (tokens need none)"
            ) from error
        raise ValueError(f"litdata cannot be imported ({reason}); {INSTALL_LITDATA}") from error


def torchvision_problem() -> str | None:
    """What is wrong with an installed torchvision; None if it works or is absent. One built for another torch breaks
    its importers."""
    if find_spec("torchvision") is None:
        return None
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return f"torchvision is installed but broken ({str(error).strip().splitlines()[0]})"
    return None


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
        self.folder = folder
        self.entry = entry
        self.vocab_size = vocab_size
        self.starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in entry.shards])])
        """(shards + 1,) int64: position of each shard's first token, then the number of tokens."""
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

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

    def _map(self, shard: int) -> np.ndarray:
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        entry = self.entry.shards[shard]
        path = self.folder / entry.file
        try:
            words = np.memmap(path, dtype=np.int32, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: missing or cut off since the start ({error}); {remake(self.folder)}") from error
        # One item per chunk: its number, then the byte offsets of its two ends, before the tokens.
        self._maps[shard] = words[3 : 3 + entry.tokens]
        if len(self._maps) > OPEN_SHARDS:
            self._maps.popitem(last=False)
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}
