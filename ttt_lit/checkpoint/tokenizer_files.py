"""Which files of a folder are its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttt_lit.identity import DEFINING_FILES, FAST_FILE, hash_file, tokenizer_hash

TOKENIZER_FILES = (
    *DEFINING_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> dict[str, str]:
    """Copy the tokenizer's files and nothing else.

    Returns:
        File name -> SHA-256 of each file copied.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
    """
    if tokenizer_hash(source) is None:
        raise FileNotFoundError(f"{source}: no tokenizer there, expected one of {', '.join(DEFINING_FILES)}")
    target.mkdir(parents=True, exist_ok=True)
    copied = {}
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
            copied[name] = hash_file(target / name)
    return copied


def highest_token_ids(folder: Path) -> tuple[int, int] | None:
    """The largest id of tokenizer.json's vocabulary, and with added tokens; None where there is no such file.

    Raises:
        ValueError: the file is not a tokenizer of the ``tokenizers`` library.
    """
    path = folder / FAST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        text = max(int(value) for value in _vocabulary_ids(content["model"]["vocab"]))
        return text, max([text, *(int(token["id"]) for token in content.get("added_tokens") or ())])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a usable tokenizer file: {type(error).__name__} {str(error)[:100]}") from None


def _vocabulary_ids(vocabulary: Any) -> list[int]:
    """Unigram vocabularies are lists in the order of the ids, all others map token -> id."""
    return [len(vocabulary) - 1] if isinstance(vocabulary, list) else list(vocabulary.values())
