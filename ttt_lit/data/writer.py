"""Token streams of the two splits → shards, resumable after any shard."""

from __future__ import annotations

import dataclasses
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lit.data.corpus import Document
from ttt_lit.data.manifest import Layout, ShardEntry, SplitEntry, file_entry, text_tokens
from ttt_lit.data.shards import write_index, write_shard
from ttt_lit.data.split import Split
from ttt_lit.data.tokenizer import TextTokenizer
from ttt_lit.identity import hash_file

PROGRESS = ".progress"
"""Folder for what only a resume needs."""
POSITION_BYTES = 8


@dataclass
class Counts:
    """Running totals; the fields of SplitEntry of the same names."""

    documents: int = 0
    documents_too_short: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    normalized_bytes: int = 0
    stored_bytes: int = 0


class PositionLog:
    """A growing list of token positions: what has been saved lies in a file, only the rest in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.saved = 0
        self._unsaved = array("q")

    def append(self, position: int) -> None:
        self._unsaved.append(position)

    def save(self) -> int:
        """Write everything to the file; returns the number of positions in it."""
        self.path.touch()
        with self.path.open("r+b") as file:
            file.truncate(self.saved * POSITION_BYTES)  # an interrupted run may have written more than it recorded
            file.seek(0, 2)
            file.write(self._unsaved.tobytes())
        self.saved += len(self._unsaved)
        self._unsaved = array("q")
        return self.saved

    def export(self, path: Path) -> None:
        """Save, and copy to a .npy file of int64."""
        self.save()
        np.save(path, np.fromfile(self.path, dtype=np.int64))


class SplitWriter:
    """Writes one split. ``save`` and ``restore`` carry it over an interruption."""

    def __init__(
        self, folder: Path, split: Split, tokenizer: TextTokenizer, *, context: int, layout: Layout, shard_tokens: int
    ) -> None:
        self.folder, self.split, self.tokenizer, self.layout = folder, split, tokenizer, layout
        self.context = context
        self.block_text = text_tokens(context + 1, tokenizer.bos_id)
        """Tokens that a block takes from the shards."""
        self.shard_tokens = shard_tokens // self.block_text * self.block_text
        self.counts = Counts()
        self.shards: list[ShardEntry] = []
        self._descriptions: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        progress = folder / PROGRESS
        self._logs = {
            "eos": PositionLog(progress / f"{split}-eos"),
            "starts": PositionLog(progress / f"{split}-starts"),
        }

    def add(self, document: Document, ids: np.ndarray) -> bool:
        """Append a document of ``ids``, (tokens,) int32, and an EOS. True if that finished a shard."""
        counts = self.counts
        if len(ids) < self.context:
            counts.documents_too_short += 1
            return False
        kept = np.append(ids, np.int32(self.tokenizer.eos_id))
        ends_with_eos = True
        if self.layout == "per_document":
            whole = len(kept) // self.block_text * self.block_text
            ends_with_eos = whole == len(kept)
            kept = kept[:whole]
        self._logs["starts"].append(counts.tokens)
        if ends_with_eos:
            self._logs["eos"].append(counts.tokens + len(kept) - 1)
        counts.documents += 1
        counts.tokens += len(kept)
        counts.raw_bytes += document.num_bytes()
        counts.normalized_bytes += int(self.tokenizer.token_bytes[ids].sum(dtype=np.int64))
        counts.stored_bytes += int(self.tokenizer.token_bytes[kept].sum(dtype=np.int64))
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
            self._logs[key].export(self.folder / name)
        blocks, rest = divmod(self.counts.tokens, self.block_text)
        return SplitEntry(
            **dataclasses.asdict(self.counts),
            blocks=blocks,
            tokens_not_served=rest,
            shards=tuple(self.shards),
            index=file_entry(self.folder, f"{self.split}/index.json"),
            eos=file_entry(self.folder, names["eos"]),
            document_starts=file_entry(self.folder, names["starts"]),
        )

    def save(self, generation: int) -> dict[str, Any]:
        """Put the tokens that fill no shard yet into a file of this generation; returns the rest of the state as
        JSON values."""
        name = f"{self.split}-pending-{generation}.npy"
        np.save(self.folder / PROGRESS / name, self._joined())
        return {
            "counts": dataclasses.asdict(self.counts),
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "descriptions": self._descriptions,
            "pending": name,
            "positions": {key: log.save() for key, log in self._logs.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``save``. Raises ValueError if a finished shard is not what it was."""
        self.counts = Counts(**state["counts"])
        self.shards = [ShardEntry(**shard) for shard in state["shards"]]
        for shard in self.shards:
            path = self.folder / shard.file
            if not path.is_file() or hash_file(path) != shard.sha256:
                raise ValueError(
                    f"{path}: finished before the interruption and damaged since; delete {self.folder} and run prepare"
                    " again"
                )
        self._descriptions = list(state["descriptions"])
        pending = np.load(self.folder / PROGRESS / state["pending"])
        self._pending, self._pending_tokens = [pending], len(pending)
        for key, log in self._logs.items():
            log.saved = state["positions"][key]

    def _joined(self) -> np.ndarray:
        return np.concatenate(self._pending) if self._pending else np.zeros(0, dtype=np.int32)

    def _write(self, count: int) -> None:
        tokens = self._joined()
        entry, description = write_shard(
            self.folder, self.split, len(self.shards), tokens[:count], scratch=self.folder / PROGRESS
        )
        self.shards.append(entry)
        self._descriptions.append(description)
        self._pending, self._pending_tokens = [tokens[count:]], len(tokens) - count
