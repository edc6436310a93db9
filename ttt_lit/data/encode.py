"""Documents → token ids, in order, in this process or in several. Light to import: worker processes load neither
torch nor transformers."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from ttt_lit.data.corpus import Document

BATCH_CHARACTERS = 1 << 20
"""Characters per unit of work: large against the cost of handing it over, small enough to keep few in flight."""

Encoded = tuple[Document, np.ndarray]
"""A document and its token ids, (tokens,) int32."""

_worker_tokenizer: Any = None


def encode_documents(documents: Iterable[Document], definition: str, num_workers: int) -> Iterator[Encoded]:
    """Yield every document with its token ids, in the order given, whatever ``num_workers``.

    0 encodes in this process, with the threads that the ``tokenizers`` library takes; n > 0 in n processes of one
    thread each.
    """
    batches = batch_documents(documents)
    if num_workers == 0:
        tokenizer = build_tokenizer(definition)
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


def batch_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def build_tokenizer(definition: str) -> Any:
    """The ``tokenizers.Tokenizer`` that ``TextTokenizer.definition`` describes."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(definition)


def encode_texts(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, (tokens,) int32, without special tokens."""
    return [
        np.array(encoding.ids, dtype=np.int32)
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def _start_worker(definition: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker_tokenizer = build_tokenizer(definition)


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return encode_texts(_worker_tokenizer, texts)
