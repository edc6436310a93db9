"""Train a tokenizer on the train split's documents and save it as an ordinary Hugging Face tokenizer folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ttt_lit.data.corpus import Document
from ttt_lit.data.split import split_of, split_rule
from ttt_lit.data.tokenizer_kinds import TRAINERS, UNNAMED_KIND, TokenizerKind

RECEIPT = "trained_on.json"


def train_tokenizer(
    folder: Path,
    read: Callable[[], Iterable[Document]],
    *,
    kind: TokenizerKind,
    vocab_size: int,
    validation_fraction: float,
    source: str,
) -> None:
    """Write ``folder`` (tokenizer.json, tokenizer_config.json, trained_on.json). Same documents in, same bytes out.

    ``read`` begins a new reading of the documents; some kinds read them twice. ``vocab_size`` counts all tokens, the
    special ones too. Too little text for it is a ValueError, and so is too little room for what ``kind`` must hold.
    """
    receipt = _Receipt()
    tokenizer, config = TRAINERS[kind](lambda: receipt.watch(read(), validation_fraction), vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"train_tokenizer: {receipt.documents} train documents of {source} give {tokenizer.get_vocab_size()}"
            f" tokens, expected {vocab_size}: ask for fewer or give more text"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    _write_json(partial / "tokenizer_config.json", config)
    made = {"kind": kind, "vocab_size": vocab_size, "split": split_rule(validation_fraction)}
    _write_json(partial / RECEIPT, {"source": source} | made | receipt.to_dict())
    partial.rename(folder)


def check_trained(folder: Path, *, kind: TokenizerKind, vocab_size: int, validation_fraction: float) -> None:
    """An existing folder must be what training would make: same kind, vocabulary and split. Else raises ValueError."""
    if not (folder / RECEIPT).is_file():
        raise ValueError(
            f"tokenizer {folder}: exists and was not trained here ({RECEIPT} is missing); leave out train_tokenizer to"
            " use it"
        )
    found = {"kind": UNNAMED_KIND} | json.loads((folder / RECEIPT).read_text())
    wanted = {"kind": kind, "vocab_size": vocab_size, "split": split_rule(validation_fraction)}
    for key, expected in wanted.items():
        if found.get(key) != expected:
            raise ValueError(
                f"tokenizer {folder}: trained with {key} {found.get(key)!r}, expected {expected!r}; delete the folder"
                " or name another"
            )


class _Receipt:
    """What a tokenizer was trained on: the train documents of the latest reading."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.documents = 0
        self.bytes = 0
        self.digest = hashlib.sha256()

    def watch(self, documents: Iterable[Document], validation_fraction: float) -> Iterator[str]:
        self._restart()
        for document in documents:
            if split_of(document, validation_fraction) == "train":
                self.documents += 1
                self.bytes += document.num_bytes()
                self.digest.update(document.digest())
                yield document.text

    def to_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256_of_document_hashes": self.digest.hexdigest(),
        }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
