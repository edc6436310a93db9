"""What a prepared folder says about itself: ``manifest.json``, and the checks of the folder against it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ttt_lit.identity import hash_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Layout = Literal["packed", "per_document"]
Verify = Literal["full", "size"]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the folder."""

    file: str
    """Path below the folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """One LitData shard."""

    tokens: int


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One side of the split. Positions count tokens of the split, shard after shard."""

    documents: int
    """Documents with tokens in the shards."""
    documents_too_short: int
    """Documents of this side that were left out: fewer tokens than one context."""
    tokens: int
    """Tokens in the shards, EOS included. BOS is not among them: it is put before a block when that is served."""
    raw_bytes: int
    """UTF-8 bytes of the documents' texts, whole, before the tokenizer's normalisation."""
    normalized_bytes: int
    """Bytes of the documents' texts, whole, as the tokenizer normalises them."""
    stored_bytes: int
    """Bytes, as normalised, of the tokens in the shards. Less than normalized_bytes where a document's rest fills no
    block."""
    blocks: int
    """Whole blocks of context + 1 tokens, BOS included: what is served at the folder's own context."""
    tokens_not_served: int
    """Tokens after the last whole block. No block is lost at a shard's end."""
    shards: tuple[ShardEntry, ...]
    index: FileEntry
    """LitData's index.json."""
    eos: FileEntry
    """.npy, (eos,) int64: positions of the EOS tokens."""
    document_starts: FileEntry
    """.npy, (documents,) int64: position of each document's first token."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (*self.shards, self.index, self.eos, self.document_starts)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared data set. Same documents, tokenizer and config: same manifest, byte for byte."""

    format_version: int
    config: dict[str, Any]
    """The PrepareConfig without output and num_workers, which change no byte."""
    layout: Layout
    context: int
    """Tokens that a model reads at once; blocks have one more, the last target."""
    dtype: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    """First token of every block; null where the tokenizer puts none before a text."""
    split: str
    """The split rule, see ``corpus.split_rule``."""
    token_bytes: FileEntry
    """.npy, (vocab_size,) int32: bytes of text per token id."""
    train: SplitEntry
    validation: SplitEntry

    @property
    def block_tokens(self) -> int:
        return self.context + 1

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (*self.train.files, *self.validation.files, self.token_bytes)

    def side(self, split: str) -> SplitEntry:
        """The entry of ``train`` or ``validation``."""
        sides = {"train": self.train, "validation": self.validation}
        if split not in sides:
            raise ValueError(f"split: got {split!r}, expected 'train' or 'validation'")
        return sides[split]

    def num_blocks(self, split: str, block_tokens: int) -> int:
        """Blocks of ``block_tokens`` tokens that the split can serve. A per_document folder has its own block size
        only."""
        if self.layout == "per_document" and block_tokens != self.block_tokens:
            raise ValueError(
                f"block_tokens: got {block_tokens}, but the folder is per_document with blocks of {self.block_tokens}"
                f" tokens (context {self.context} + 1); prepare another with context {block_tokens - 1}, or layout"
                " packed"
            )
        return self.side(split).tokens // text_tokens(block_tokens, self.bos_id)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest. Raises FileNotFoundError or ValueError with the command that makes the folder."""
        path = folder / MANIFEST
        if not path.is_file():
            partial = " (unfinished; the command continues it)" if partial_folder(folder).is_dir() else ""
            raise FileNotFoundError(
                f"data folder {folder}: no {MANIFEST} there{partial}; run: {prepare_command(folder)}"
            )
        try:
            data = json.loads(path.read_text())
            version = data["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {remake(folder)}")
            sides = {split: _split_entry(data.pop(split)) for split in ("train", "validation")}
            # A manifest without bos_id is from before there was one, and its blocks have none.
            return cls(**{"bos_id": None} | data | sides | {"token_bytes": FileEntry(**data["token_bytes"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a manifest ({error}); {remake(folder)}") from error

    def verify(self, folder: Path, how: Verify) -> None:
        """Compare every file with the manifest: sizes, and in ``full`` contents. Raises on the first that differs."""
        for entry in self.files:
            path = folder / entry.file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, the manifest lists it; {remake(folder)}")
            if path.stat().st_size != entry.bytes:
                raise ValueError(
                    f"{path}: damaged, got {path.stat().st_size} bytes, expected {entry.bytes}; {remake(folder)}"
                )
        if how == "full":
            for entry in self.files:
                if hash_file(folder / entry.file) != entry.sha256:
                    raise ValueError(
                        f"{folder / entry.file}: damaged or from another data set, its SHA-256 is not the manifest's;"
                        f" {remake(folder)}"
                    )


def text_tokens(block_tokens: int, bos_id: int | None) -> int:
    """Tokens of text in a block of ``block_tokens`` tokens: all, or all but the first, which is BOS.

    BOS is an input only. Every target is text, and consecutive blocks leave out no token.
    """
    return block_tokens if bos_id is None else block_tokens - 1


def file_entry(folder: Path, name: str) -> FileEntry:
    path = folder / name
    return FileEntry(file=name, bytes=path.stat().st_size, sha256=hash_file(path))


def partial_folder(folder: Path) -> Path:
    """Where an unfinished folder grows until it is renamed."""
    return folder.with_name(folder.name + ".partial")


def prepare_command(folder: Path, configs: Path = Path("configs/data")) -> str:
    """The command that makes a folder: with the config whose output it is, where there is one."""
    for path in sorted(configs.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())
        if isinstance(data, dict) and Path(str(data.get("output"))) == folder:
            return f"python cli.py prepare --config {path}"
    return f"python cli.py prepare --config {configs}/NAME.yaml"


def remake(folder: Path) -> str:
    return f"delete {folder} and run: {prepare_command(folder)}"


def _split_entry(data: dict[str, Any]) -> SplitEntry:
    shards = tuple(ShardEntry(**shard) for shard in data["shards"])
    files = {name: FileEntry(**data[name]) for name in ("index", "eos", "document_starts")}
    return SplitEntry(**data | files | {"shards": shards})
