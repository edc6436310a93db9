"""The held-out blocks that a probe reads: one per document, because documents are what is independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from ttt_lit.data.stream import StreamRequest, TokenDataModule
from ttt_lit.train.position import block_ids

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some text of one held-out document."""

    id: str
    """Of its tokens, as in a run record."""
    document: int
    """Numbered in its split."""
    tokens: Tensor
    """(1, context + 1) int64, BOS first where the folder has one."""


def held_out_blocks(data: TokenDataModule, context: int, limit: int) -> list[Block]:
    """The first ``context`` + 1 tokens of the middle block of each held-out document; of ``limit`` documents, evenly spread.

    A document's middle is text, where its beginning may be a title page.

    Raises:
        ValueError: the folder's blocks cross documents or are shorter, or none is held out.
    """
    manifest = data.manifest("long")
    if manifest.layout != "per_document" or manifest.context < context:
        raise ValueError(
            f"--data: {data.folders['long']} is {manifest.layout} with context {manifest.context}, expected per_document with context "
            f"{context} or more, so that no block crosses a document; prepare it so"
        )
    count = manifest.num_blocks("validation", manifest.block_tokens)
    request = StreamRequest(
        dataset="long",
        split="validation",
        block_tokens=manifest.block_tokens,
        batch_size=1,
        num_batches=max(1, count),
    )
    batches = data.open(request).batches
    numbers: dict[int, list[int]] = {}
    for number, document in enumerate(batches.sources(np.arange(count)).tolist()):
        numbers.setdefault(document, []).append(number)
    found = []
    for document in spread(sorted(numbers), limit):
        own = numbers[document]
        tokens = batches[own[len(own) // 2]]["tokens"][:, : context + 1]
        found.append(Block(id=f"{int(block_ids(tokens)[0]):012x}", document=document, tokens=tokens))
    return found


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of them, evenly spread and in order."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
