"""Train a tokenizer on the train split's documents and save it as an ordinary Hugging Face tokenizer folder.

Two kinds: byte-level BPE, as Qwen's, and BPE with byte fallback, as Gemma's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ttt_lit.data.corpus import Document, split_of, split_rule
from ttt_lit.data.tokenizer import BYTE_PIECES, SPACE_PIECE

RECEIPT = "trained_on.json"

TokenizerKind = Literal["byte_level", "byte_fallback"]
UNNAMED_KIND: TokenizerKind = "byte_level"
"""The kind behind a receipt or manifest that names none: it was written when there was no other."""

EOS_TOKEN = "<|endoftext|>"
"""The byte-level tokenizer's only special token, id 0."""

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
"""The byte-fallback tokenizer's special tokens, ids 0 to 4 in this order, as in Gemma."""

CHARACTER_COVERAGE = 0.9995
"""Share of the text whose characters get pieces of their own, SentencePiece's default; the rest is spelt in bytes."""

WORDS = (
    rf"{SPACE_PIECE}*(?:[\p{{L}}\p{{M}}]+|\p{{N}}|[^{SPACE_PIECE}\s\p{{L}}\p{{M}}\p{{N}}]+)|{SPACE_PIECE}+|\n+|[^\S\n]+"
)
"""What a byte-fallback piece may span: letters, one digit or punctuation, with all spaces in front of them; spaces alone;
newlines; other blanks. No two neighbours could stand in one piece, so an encoder that does not split, as Gemma's, makes
the same pieces, while training sees words and not whole documents."""

ReadTexts = Callable[[], Iterator[str]]
"""Begins a new reading of the same texts."""

Trained = tuple[Tokenizer, dict[str, str]]
"""A tokenizer and the content of tokenizer_config.json."""


def obtain_tokenizer(
    folder: Path,
    read: Callable[[], Iterable[Document]],
    *,
    kind: TokenizerKind,
    vocab_size: int,
    validation_fraction: float,
    source: str,
) -> None:
    """Train ``folder`` (tokenizer.json, tokenizer_config.json, trained_on.json); one that exists must be what training would
    make: same kind, vocabulary and split.

    Same documents in, same bytes out. ``read`` begins a new reading of the documents; some kinds read them twice.
    ``vocab_size`` counts all tokens, the special ones too.

    Raises:
        ValueError: an existing folder is another's; too little text, or too little room for what ``kind`` must hold.
    """
    wanted = {"kind": kind, "vocab_size": vocab_size, "split": split_rule(validation_fraction)}
    if folder.is_dir():
        _check_receipt(folder, wanted)
        return
    trained_on: dict[str, Any] = {}

    def read_texts() -> Iterator[str]:
        documents, num_bytes, digest = 0, 0, hashlib.sha256()
        for document in read():
            if split_of(document, validation_fraction) == "train":
                documents += 1
                num_bytes += document.num_bytes()
                digest.update(document.digest())
                yield document.text
        trained_on.update(documents=documents, bytes=num_bytes, sha256_of_document_hashes=digest.hexdigest())

    tokenizer, config = TRAINERS[kind](read_texts, vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"train_tokenizer: {trained_on['documents']} train documents of {source} give {tokenizer.get_vocab_size()}"
            f" tokens, expected {vocab_size}: ask for fewer or give more text"
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(str(partial / "tokenizer.json"))
    for name, content in (("tokenizer_config.json", config), (RECEIPT, {"source": source} | wanted | trained_on)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(folder)


def _check_receipt(folder: Path, wanted: dict[str, Any]) -> None:
    if not (folder / RECEIPT).is_file():
        raise ValueError(
            f"tokenizer {folder}: exists and was not trained here ({RECEIPT} is missing); leave out train_tokenizer to"
            " use it"
        )
    found = {"kind": UNNAMED_KIND} | json.loads((folder / RECEIPT).read_text())
    for key, expected in wanted.items():
        if found.get(key) != expected:
            raise ValueError(
                f"tokenizer {folder}: trained with {key} {found.get(key)!r}, expected {expected!r}; delete the folder"
                " or name another"
            )


def train_byte_level(read_texts: ReadTexts, vocab_size: int) -> Trained:
    """Byte-level BPE of at most ``vocab_size`` tokens: ``<|endoftext|>``, 256 bytes, then merges.

    Raises ValueError for a ``vocab_size`` without room for the first two.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_room(vocab_size, len(alphabet) + 1, f"256 bytes and {EOS_TOKEN}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_texts(), trainer)
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN}


def train_byte_fallback(read_texts: ReadTexts, vocab_size: int) -> Trained:
    """BPE of at most ``vocab_size`` tokens: special tokens, 256 byte pieces, the common characters, then merges.

    A space is ``▁``, so a ``▁`` in a text is read as a space; every other text is given back exactly. Reads the texts
    twice, first for the characters. Raises ValueError for a ``vocab_size`` without room for the first three.
    """
    from transformers import GemmaTokenizer

    alphabet = common_characters(read_texts())
    given = [*SPECIAL_TOKENS.values(), *BYTE_PIECES]
    _check_room(
        vocab_size,
        len(given) + len(alphabet),
        f"{len(SPECIAL_TOKENS)} special tokens, 256 bytes and {len(alphabet)} characters",
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", SPACE_PIECE)
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=given,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(read_texts(), trainer)
    learned = json.loads(learner.to_str())["model"]

    # A second tokenizer, since the first recognises the spelling of a byte piece in a text. Gemma's own also puts <bos>
    # before every text; a model trained on this one has never seen it there.
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    tokenizer = GemmaTokenizer(vocab=learned["vocab"], merges=merges, **SPECIAL_TOKENS).backend_tokenizer
    tokenizer.post_processor = None
    return tokenizer, {"tokenizer_class": "GemmaTokenizer", **SPECIAL_TOKENS}


TRAINERS: dict[TokenizerKind, Callable[[ReadTexts, int], Trained]] = {
    "byte_level": train_byte_level,
    "byte_fallback": train_byte_fallback,
}


def common_characters(texts: Iterator[str]) -> list[str]:
    """The most frequent characters that make up ``CHARACTER_COVERAGE`` of the texts, and ``▁``, sorted.

    Counted here because the library breaks ties between equally frequent characters at random.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    counts[SPACE_PIECE] += counts.pop(" ", 0)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in ranked])
    last = int(np.searchsorted(covered, CHARACTER_COVERAGE * counts.total()))
    return sorted({SPACE_PIECE, *ranked[: last + 1]})


def _check_room(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise ValueError(f"train_tokenizer: got {vocab_size}, expected at least {needed} ({what})")
