"""Whether the tokens of a text spell that text.

A tokenizer may write a text in another way, but not as another text: its canonical Unicode form may differ (NFC, as
Qwen's), a ``▁`` may be read as the space that it stands for, and one space may be put in front. Lower case, stripped
accents or blanks, compatibility forms (NFKC), characters without a token and the like are refused. Seen by reading a
text made of what gets lost, and the first documents of the source.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import Encoded, encode_documents
from ttt_lit.data.tokenizer import SPACE_PIECE, TextTokenizer

SAMPLE_CHARACTERS = 1 << 20
"""Characters of the source that are held against their tokens, in whole documents."""
SHOWN = 12

_EVERY_BYTE = [*range(0x100), *range(0x100, 0x800, 0x40), *range(0x800, 0x1000, 0x100), *range(0x1000, 0xD800, 0x1000)]
_EVERY_BYTE += [0xE000, 0xF000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]
PROBE = Document(
    "probe",
    "  Two blanks, CAPITALS, naïve straße, e\u0301 decomposed, \u212b, ﬁ ² ① ｆｕｌｌ Ⅷ …, a\u00a0b\u200bc\u200dd\ufeffe,\n\n\t"
    "tab\r\n中文 Ελλάδα हिन्दी עברית 한국어 😀👩‍👩‍👧   3,141.59 x==y  <0x41> ## </w> @@ ▁▁ <s></s><unk>[UNK] "
    + "".join(map(chr, _EVERY_BYTE))
    + " \n",
)
"""What tokenizers are known to lose, and every byte that UTF-8 knows."""


def encode_exactly(documents: Iterable[Document], tokenizer: TextTokenizer, num_workers: int) -> Iterator[Encoded]:
    """``encode_documents``, held against the texts.

    Raises:
        ValueError: a text became a special token, or its tokens spell something else; the message names the step.
    """
    checked = 0
    for document, ids in encode_documents(chain((PROBE,), documents), tokenizer.definition, num_workers):
        if tokenizer.forbidden[ids].any():
            token = int(ids[tokenizer.forbidden[ids]][0])
            raise ValueError(
                f"{_named(document)}: its text became the special token {token}; tokenizer {tokenizer.name}"
                f" ({_steps(tokenizer)}) cannot be used"
            )
        if checked < SAMPLE_CHARACTERS:
            checked += len(document.text)
            check_spelling(tokenizer, document, ids)
        if document is not PROBE:
            yield document, ids


def check_spelling(tokenizer: TextTokenizer, document: Document, ids: np.ndarray) -> None:
    """ValueError unless ``ids``, (tokens,) int32, spell the document's text."""
    expected = _canonical(document.text, tokenizer)
    spelt = _canonical(tokenizer.spell(ids), tokenizer)
    if spelt in (expected, " " + expected):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, spelt, strict=False)) if a != b), min(len(expected), len(spelt))
    )
    was, became = (text[max(0, at - SHOWN) : at + SHOWN] for text in (expected, spelt))
    raise ValueError(
        f"tokenizer {tokenizer.name}: loses text: its tokens spell {became!r} where {_named(document)} has {was!r}"
        f" ({_steps(tokenizer)}); expected the text itself, up to its canonical Unicode form and one space in front; name"
        " a tokenizer that keeps it"
    )


def _named(document: Document) -> str:
    return "our test text" if document is PROBE else f"document {document.id}"


def _canonical(text: str, tokenizer: TextTokenizer) -> str:
    return unicodedata.normalize("NFC", text if tokenizer.byte_level else text.replace(SPACE_PIECE, " "))


def _steps(tokenizer: TextTokenizer) -> str:
    definition = json.loads(tokenizer.definition)
    named = {name.replace("_", "-"): list(_kinds(definition[name])) for name in ("normalizer", "pre_tokenizer")}
    return ", ".join(f"{name} {' + '.join(kinds) or 'none'}" for name, kinds in named.items())


def _kinds(part: Any) -> Iterator[str]:
    """Types of a normalizer's or pre-tokenizer's steps, in order."""
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    if part["type"] != "Sequence":
        yield part["type"]
    for step in inner or ():
        yield from _kinds(step)
