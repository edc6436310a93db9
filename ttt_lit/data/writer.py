"""The token stream of a split → shards, resumable after any shard."""

from __future__ import annotations

import dataclasses
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lit.data.corpus import Document, Split
from ttt_lit.data.manifest import Layout, ShardEntry, SplitEntry, file_entry, text_tokens
from ttt_lit.data.shards import write_index, write_shard
from ttt_lit.data.tokenizer import TextTokenizer
from ttt_lit.identity import hash_file

PROGRESS = ".progress"
"""Folder for what only a resume needs."""
COUNTS = ("documents", "documents_too_short", "tokens", "raw_bytes", "normalized_bytes", "stored_bytes")
"""Fields of SplitEntry that are counted while writing."""
ARRAYS = ("pending", "eos", "starts")
"""What ``SplitWriter.arrays`` holds."""


class SplitWriter:
    """Writes one split. ``plain`` and ``arrays`` are its state, with which ``restore`` carries it over an interruption."""

    def __init__(
        self, folder: Path, split: Split, tokenizer: TextTokenizer, *, context: int, layout: Layout, shard_tokens: int
    ) -> None:
        self.folder, self.split, self.tokenizer, self.layout = folder, split, tokenizer, layout
        self.context = context
        self.block_text = text_tokens(context + 1, tokenizer.bos_id)
        """Tokens that a block takes from the shards."""
        self.shard_tokens = shard_tokens // self.block_text * self.block_text
        self.counts = dict.fromkeys(COUNTS, 0)
        self.shards: list[ShardEntry] = []
        self._descriptions: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._eos, self._starts = array("q"), array("q")

    def add(self, document: Document, ids: np.ndarray) -> bool:
        """Append a document of ``ids``, (tokens,) int32, and an EOS. True if that finished a shard."""
        counts = self.counts
        if len(ids) < self.context:
            counts["documents_too_short"] += 1
            return False
        kept = np.append(ids, np.int32(self.tokenizer.eos_id))
        if self.layout == "per_document":
            kept = kept[: len(kept) // self.block_text * self.block_text]
        self._starts.append(counts["tokens"])
        if len(kept) > len(ids):
            self._eos.append(counts["tokens"] + len(ids))
        counts["documents"] += 1
        counts["tokens"] += len(kept)
        counts["raw_bytes"] += document.num_bytes()
        counts["normalized_bytes"] += int(self.tokenizer.token_bytes[ids].sum(dtype=np.int64))
        counts["stored_bytes"] += int(self.tokenizer.token_bytes[kept].sum(dtype=np.int64))
        self._pending.append(kept)
        self._pending_tokens += len(kept)
        finished = self._pending_tokens >= self.shard_tokens
        while self._pending_tokens >= self.shard_tokens:
            self._write(self.shard_tokens)
        return finished

    def finish(self) -> SplitEntry:
        """Write the last, shorter shard, the index and the positions."""
        if self._pending_tokens:
            self._write(self._pending_tokens)
        write_index(self.folder, self.split, self._descriptions, self.shard_tokens)
        names = {"eos": f"{self.split}/eos.npy", "starts": f"{self.split}/document_starts.npy"}
        for key, name in names.items():
            np.save(self.folder / name, self.arrays()[key])
        blocks, rest = divmod(self.counts["tokens"], self.block_text)
        return SplitEntry(
            **self.counts,
            blocks=blocks,
            tokens_not_served=rest,
            shards=tuple(self.shards),
            index=file_entry(self.folder, f"{self.split}/index.json"),
            eos=file_entry(self.folder, names["eos"]),
            document_starts=file_entry(self.folder, names["starts"]),
        )

    def plain(self) -> dict[str, Any]:
        """Counts and finished shards, as JSON values."""
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return {"counts": self.counts, "shards": shards, "descriptions": self._descriptions}

    def arrays(self) -> dict[str, np.ndarray]:
        """Tokens that fill no shard yet, (tokens,) int32, and positions of EOS tokens and first tokens, int64."""
        positions = {
            name: np.array(found, dtype=np.int64) for name, found in (("eos", self._eos), ("starts", self._starts))
        }
        return {"pending": np.concatenate([np.zeros(0, dtype=np.int32), *self._pending])} | positions

    def restore(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Continue from a saved state. Raises ValueError if a finished shard is not what it was."""
        self.counts = plain["counts"]
        self.shards = [ShardEntry(**shard) for shard in plain["shards"]]
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file() or hash_file(path) != shard.sha256:
                raise ValueError(
                    f"{path}: finished before the interruption and damaged since; delete {self.folder} and run prepare"
                    " again"
                )
        self._descriptions = plain["descriptions"]
        self._pending, self._pending_tokens = [arrays["pending"]], len(arrays["pending"])
        self._eos, self._starts = (array("q", arrays[name].tolist()) for name in ("eos", "starts"))

    def _write(self, count: int) -> None:
        tokens = self.arrays()["pending"]
        entry, description = write_shard(
            self.folder, self.split, len(self.shards), tokens[:count], scratch=self.folder / PROGRESS
        )
        self.shards.append(entry)
        self._descriptions.append(description)
        self._pending, self._pending_tokens = [tokens[count:]], len(tokens) - count
