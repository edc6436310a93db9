"""The unigram entropy is that of the validation split, counted one token at a time."""

import math
from collections import Counter

import numpy as np

from ttt_lit.data import entropy
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.shards import TokenReader
from ttt_lit.data.stream import TokenDataModule


def test_unigram_entropy_equals_counting(packed, monkeypatch):
    monkeypatch.setattr(entropy, "_PIECE", 97)  # several pieces, the last one short
    manifest = Manifest.load(packed)
    tokens = np.fromfile(packed / manifest.validation.shards[0].file, dtype=np.int32)
    reader = TokenReader(packed, manifest.validation, manifest.vocab_size)
    served = reader.read(0, int(reader.starts[-1])).tolist()
    assert set(served) <= set(tokens.tolist()) or len(manifest.validation.shards) > 1
    counts = Counter(served)
    expected = -sum(n / len(served) * math.log(n / len(served)) for n in counts.values())
    assert math.isclose(TokenDataModule(short=str(packed)).unigram_entropy("short"), expected, rel_tol=1e-12)
    assert 0 < expected < math.log(manifest.vocab_size)
