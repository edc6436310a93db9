"""What the sentences of the primary gate are about."""

import re

NOMINAL = (0.35, 0.5, 0.7, 1.0)
"""Shares of the baseline's GPU-hours at which a candidate is run."""

# Reason → what its sentence says. Every sentence of the gate must be exactly one of these.
SENTENCES = {
    "no baseline": "there is no baseline",
    "baseline not from scratch": "did not start from random weights",
    "no runs": "no wall-clock-matched runs",
    "missing share": "no run at .* of the baseline's GPU-hours",
    "single seed": "a single seed",
    "unfinished": "the run did not finish: (diverged|interrupted)",
    "nan": "a document's loss is not finite",
    "seed alone": "without a partner of the same seed",
    "twice": "2 runs of seed",
    "other documents": "measured on different documents",
    "few documents": r"documents, an interval needs",
    "demo evaluation": "evaluation tokens, at least",
    "demo training": "training tokens, at least",
    "demo context": "long context of",
    "unknown entropy": "the unigram entropy is not known",
    "learnt too little": "has learnt too little",
    "devices": "GPU-hours of different devices",
    "unknown parents": "cost of parents is not known",
    "order": "with more GPU-hours does not",
    "crossing": "the interval crosses 0.01",
    "too dear": "no run within 0.71",
    "gap": "no run between .* where the loss is worse, and 0.71",
    "unmatched": "is not the matched baseline of",
    "inner loops": "start from weights do not have the same inner loop",
}


def reason_kinds(reasons):
    kinds = set()
    for reason in reasons:
        found = [kind for kind, pattern in SENTENCES.items() if re.search(pattern, reason)]
        assert len(found) == 1, (reason, found)
        kinds.add(found[0])
    return kinds
