"""Train a byte-level BPE on the train split's documents and save it as an ordinary Hugging Face tokenizer folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ttt_lit.data.corpus import Document
from ttt_lit.data.split import split_of, split_rule

EOS_TOKEN = "<|endoftext|>"
RECEIPT = "trained_on.json"


def train_tokenizer(
    folder: Path, documents: Iterable[Document], vocab_size: int, validation_fraction: float, source: str
) -> None:
    """Write ``folder`` (tokenizer.json, tokenizer_config.json, trained_on.json). Same documents in, same bytes out.

    ``vocab_size`` counts the EOS token ``<|endoftext|>`` (id 0) and the 256 bytes. Too little text for it is a
    ValueError.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"train_tokenizer: got {vocab_size}, expected at least {len(alphabet) + 1} (256 bytes and {EOS_TOKEN})"
        )
    receipt = _Receipt()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(receipt.watch(documents, validation_fraction), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"train_tokenizer: {receipt.documents} train documents of {source} give {tokenizer.get_vocab_size()}"
            f" tokens, expected {vocab_size}: ask for fewer or give more text"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    _write_json(
        partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}
    )
    _write_json(partial / RECEIPT, receipt.to_dict(source, vocab_size, validation_fraction))
    partial.rename(folder)


def check_trained(folder: Path, vocab_size: int, validation_fraction: float) -> None:
    """An existing folder must be what training would make: same vocabulary, same split. Raises ValueError otherwise."""
    if not (folder / RECEIPT).is_file():
        raise ValueError(
            f"tokenizer {folder}: exists and was not trained here ({RECEIPT} is missing); leave out train_tokenizer to"
            " use it"
        )
    found = json.loads((folder / RECEIPT).read_text())
    for key, expected in (("vocab_size", vocab_size), ("split", split_rule(validation_fraction))):
        if found.get(key) != expected:
            raise ValueError(
                f"tokenizer {folder}: trained with {key} {found.get(key)!r}, expected {expected!r}; delete the folder"
                " or name another"
            )


class _Receipt:
    """What a tokenizer was trained on."""

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0
        self.digest = hashlib.sha256()

    def watch(self, documents: Iterable[Document], validation_fraction: float) -> Iterator[str]:
        for document in documents:
            if split_of(document, validation_fraction) == "train":
                self.documents += 1
                self.bytes += document.num_bytes()
                self.digest.update(document.digest())
                yield document.text

    def to_dict(self, source: str, vocab_size: int, validation_fraction: float) -> dict[str, Any]:
        return {
            "source": source,
            "vocab_size": vocab_size,
            "split": split_rule(validation_fraction),
            "documents": self.documents,
            "bytes": self.bytes,
            "sha256_of_document_hashes": self.digest.hexdigest(),
        }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
