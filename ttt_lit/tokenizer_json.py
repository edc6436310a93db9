"""What a tokenizer.json says about the tokens that a text can become. Standard library only.

For everyone who reads the file: an id that no text can produce needs no row in a model's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vocabulary_of(full: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the base vocabulary. Unigram vocabularies are lists in the order of the ids, all others such a map."""
    vocabulary = full["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {piece[0]: index for index, piece in enumerate(vocabulary)}
    return {token: int(index) for token, index in vocabulary.items()}


def special_strings(full: Mapping[str, Any]) -> set[str]:
    """Strings that are not recognised in a text: special tokens and added ones that the base vocabulary does not know.

    Added tokens that the base vocabulary knows and that are not special stay (runs of spaces in Gemma): the model reads
    them as text. Those that swallow the spaces around them go, or bytes would be lost.
    """
    known = vocabulary_of(full)
    added = {str(token.get("content")) for token in full.get("added_tokens") or () if not _is_text(token, known)}
    unknown = full["model"].get("unk_token")
    return added | ({unknown} if unknown else set())


def text_ids(full: Mapping[str, Any]) -> dict[int, str]:
    """Id -> token, for every token that a text may become."""
    special = special_strings(full)
    return {index: token for token, index in vocabulary_of(full).items() if token not in special}


def _is_text(token: Mapping[str, Any], known: Mapping[str, int]) -> bool:
    swallows = token.get("lstrip") or token.get("rstrip")
    return token.get("content") in known and not (token.get("special") or swallows)
