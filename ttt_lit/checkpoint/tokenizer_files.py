"""Which files of a folder are its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ttt_lit.identity import DEFINING_FILES, FAST_FILE, hash_file, tokenizer_hash
from ttt_lit.tokenizer_json import text_ids, vocabulary_of

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


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """What an import must know of a tokenizer.json."""

    highest_text_id: int
    """Largest id that a text can become."""
    highest_text_token: str
    highest_id: int
    """Largest id of all, special and other added tokens included."""
    tokens: dict[int, str]
    """Id -> token, all of them."""


def read_tokenizer_file(folder: Path) -> TokenizerFile | None:
    """The folder's tokenizer.json; None where there is no such file.

    Raises:
        ValueError: the file is not a tokenizer of the ``tokenizers`` library.
    """
    path = folder / FAST_FILE
    if not path.is_file():
        return None
    try:
        full = json.loads(path.read_text(encoding="utf-8"))
        text = text_ids(full)
        tokens = {index: token for token, index in vocabulary_of(full).items()}
        tokens |= {int(token["id"]): str(token.get("content")) for token in full.get("added_tokens") or ()}
        highest = max(text)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a usable tokenizer file: {type(error).__name__} {str(error)[:100]}; is the download complete?"
        ) from None
    return TokenizerFile(
        highest_text_id=highest, highest_text_token=text[highest], highest_id=max(tokens), tokens=tokens
    )


def names_eos(folder: Path) -> bool:
    """Whether a description beside the tokenizer names its EOS token, which ``prepare`` puts between documents."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False
