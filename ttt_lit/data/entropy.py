"""How much of a text the frequencies of its tokens alone explain: the mark that a trained model must leave well behind."""

from __future__ import annotations

import numpy as np

from ttt_lit.data.shards import TokenReader

_PIECE = 1 << 20


def unigram_entropy(reader: TokenReader) -> float:
    """Entropy in nats per token of the token frequencies of a whole split: the loss of knowing those frequencies and nothing else."""
    counts = np.zeros(reader.vocab_size, dtype=np.int64)
    total = int(reader.starts[-1])
    for start in range(0, total, _PIECE):
        counts += np.bincount(reader.read(start, min(_PIECE, total - start)), minlength=reader.vocab_size)
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())
