"""Which files of a folder are its tokenizer, and what an import must know of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttt_lit.identity import DEFINING_FILES, FAST_FILE, tokenizer_hash
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and nothing else.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
    """
    if tokenizer_hash(source) is None:
        raise FileNotFoundError(f"{source}: no tokenizer there, expected one of {', '.join(DEFINING_FILES)}")
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def describe_tokenizer(folder: Path, *, rows: int, eos: Any) -> tuple[dict[str, Any], list[str]]:
    """The audit's entry of a source's tokenizer, and notes.

    Args:
        folder: the source.
        rows: of the embedding.
        eos: config.json's ``eos_token_id``.

    Raises:
        ValueError: an id that a text can become and that has no row, or tokenizer.json is no tokenizer.
    """
    files = sorted(name for name in TOKENIZER_FILES if (folder / name).is_file())
    digest, notes, highest = tokenizer_hash(folder), [], None
    if digest is None:
        why = f"{', '.join(files)} alone are not read" if files else "the source has none"
        return {"sha256": None, "files": files, "highest_id": None}, [
            f"no tokenizer comes with the checkpoint ({why}); put the model's tokenizer.json into the source and import again"
        ]
    text, tokens = _read_ids(folder / FAST_FILE) if (folder / FAST_FILE).is_file() else ({}, {})
    if text and max(text) >= rows:
        raise ValueError(
            f"{folder / FAST_FILE}: has ids up to {max(text)}, the embedding {rows} rows, and a text can "
            f"become that token ({text[max(text)]!r}); the tokenizer belongs to another model"
        )
    if tokens and (highest := max(tokens)) >= rows:
        notes.append(
            f"the tokenizer's added tokens reach id {highest}, beyond the embedding's {rows} rows; no text becomes such a "
            "token, so nothing is lost"
        )
    if not _names_eos(folder):
        eos = eos[0] if isinstance(eos, list) and eos else eos
        token = tokens.get(eos) if isinstance(eos, int) else None
        known = f' (config.json\'s eos_token_id {eos} is "{token}")' if token is not None else ""
        notes.append(
            'tokenizer_config.json names no eos_token, which prepare needs: write {"eos_token": "TOKEN"} into that file of the '
            f"source{known} and import again"
        )
    return {"sha256": digest, "files": files, "highest_id": highest}, notes


def _read_ids(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Id -> token of a tokenizer.json: those that a text can become, and all, special and other added tokens included."""
    try:
        full = json.loads(path.read_text(encoding="utf-8"))
        tokens = {index: token for token, index in vocabulary_of(full).items()}
        tokens |= {int(token["id"]): str(token.get("content")) for token in full.get("added_tokens") or ()}
        text = text_ids(full)
        max(text), max(tokens)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a usable tokenizer file: {type(error).__name__} {str(error)[:100]}; is the download complete?"
        ) from None
    return text, tokens


def _names_eos(folder: Path) -> bool:
    """Whether a description beside the tokenizer names its EOS token, which ``prepare`` puts between documents."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False
