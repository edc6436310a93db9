"""Documents → token ids, in order, in this process or in several, and whether the tokens of a text spell that text.

A tokenizer may write a text in another way, but not as another text: its canonical Unicode form may differ (NFC, as
Qwen's), a ``▁`` may be read as the space that it stands for, and one space may be put in front. Lower case, stripped
accents or blanks, compatibility forms (NFKC), characters without a token and the like are refused. Seen by reading a
text made of what gets lost, and the first documents of the source.

Light to import: worker processes load neither torch nor transformers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ttt_lit.data.corpus import Document
from ttt_lit.data.tokenizer import SPACE_PIECE, TextTokenizer, step_kinds

BATCH_CHARACTERS = 1 << 20
"""Characters per unit of work: large against the cost of handing it over, small enough to keep few in flight."""
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

Encoded = tuple[Document, np.ndarray]
"""A document and its token ids, (tokens,) int32."""

_worker_tokenizer: Any = None


def encode_exactly(documents: Iterable[Document], tokenizer: TextTokenizer, num_workers: int) -> Iterator[Encoded]:
    """``encode_documents``, held against the texts.

    Raises:
        ValueError: a text became a special token, or its tokens spell something else; the message names the step.
    """
    checked = 0
    for document, ids in encode_documents(chain((PROBE,), documents), tokenizer.definition, num_workers):
        special = ids[tokenizer.token_bytes[ids] == 0]
        if special.size:
            raise ValueError(
                f"{_named(document)}: its text became the special token {special[0]}; tokenizer {tokenizer.name}"
                f" ({_steps(tokenizer)}) cannot be used"
            )
        if checked < SAMPLE_CHARACTERS:
            checked += len(document.text)
            _check_spelling(tokenizer, document, ids)
        if document is not PROBE:
            yield document, ids


def encode_documents(documents: Iterable[Document], definition: str, num_workers: int) -> Iterator[Encoded]:
    """Yield every document with its token ids, in the order given, whatever ``num_workers``.

    0 encodes in this process, with the threads that the ``tokenizers`` library takes; n > 0 in n processes of one
    thread each.
    """
    batches = _batches(documents)
    if num_workers == 0:
        tokenizer = Tokenizer.from_str(definition)
        for batch in batches:
            yield from zip(batch, encode_texts(tokenizer, [document.text for document in batch]), strict=True)
        return
    # Not forked: the parent holds the threads of several libraries.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(definition,)) as pool:
        in_flight: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        try:
            for batch in batches:
                in_flight.append((batch, pool.submit(_encode_in_worker, [document.text for document in batch])))
                if len(in_flight) > 2 * num_workers:
                    done, future = in_flight.popleft()
                    yield from zip(done, future.result(), strict=True)
            while in_flight:
                done, future = in_flight.popleft()
                yield from zip(done, future.result(), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into lists of about ``BATCH_CHARACTERS`` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, (tokens,) int32, without special tokens."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _start_worker(definition: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker_tokenizer = Tokenizer.from_str(definition)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return encode_texts(_worker_tokenizer, texts)


def _check_spelling(tokenizer: TextTokenizer, document: Document, ids: np.ndarray) -> None:
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
    named = {name.replace("_", "-"): step_kinds(definition[name]) for name in ("normalizer", "pre_tokenizer")}
    return ", ".join(f"{name} {' + '.join(kinds) or 'none'}" for name, kinds in named.items())
