"""What a run measures, as its record has it. Losses in nats per token. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ttt_lit.record.codec import ADDED_LATER


@dataclass(kw_only=True)
class Transition:
    """Proof of the conversion into a stage: one fixed batch in float32 at this stage's context."""

    kind: str
    """What was converted, in words."""
    preserves: bool
    """Whether the function must not change."""
    before: float
    """Loss as the stage before computes it, inner loop off."""
    after: float
    """Loss as this stage computes it, without inner updates."""
    tolerance: float
    """Largest allowed absolute difference where the function is preserved."""

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def held(self) -> bool:
        """Whether the promise, if there is one, was kept. NaN keeps none."""
        return not self.preserves or abs(self.difference) <= self.tolerance


@dataclass(kw_only=True)
class Bucket:
    """Mean loss over the positions start … stop − 1."""

    start: int
    """First position."""
    stop: int
    """One past the last position."""
    nats_per_token: float
    """Mean over these positions."""


@dataclass(kw_only=True)
class Document:
    """One held-out block: the unit that comparisons are paired by. Losses in nats per token."""

    id: str
    """First 48 bits of the SHA-256 of its tokens: equal ids are equal blocks."""
    source: int
    """The document it was cut from, numbered in its split: blocks of one document are not independent."""
    bytes: int
    """Bytes of the text of its targets."""
    nats_per_token: float
    short: float
    """Mean over the positions of the short context."""
    deciles: list[float]
    """Mean over each tenth of the positions, in order."""


@dataclass(kw_only=True)
class Validation:
    """One pass over held-out documents."""

    inner: Literal["on", "off"]
    """``on`` or ``off``: whether fast weights were updated."""
    context: int
    """Tokens per block."""
    nats_per_token: float
    """Mean over all tokens."""
    bits_per_byte: float
    """Total loss over the bytes of the text."""
    blocks: int
    tokens: int
    bytes: int
    buckets: list[Bucket]
    """Loss by position, log-spaced, from 0 to the context without gaps."""
    documents: list[Document] = field(default_factory=list)
    """Every block, sorted by id: what comparisons are paired by."""
    curve: str | None = None
    """Array file with the loss at every position, relative to the record."""


@dataclass(kw_only=True)
class Norms:
    """Summary of a stage's inner update norms: L2 norm of the fast weights' change per chunk."""

    mean: float
    minimum: float
    maximum: float
    last: float
    """Mean of the last optimiser step that was looked at."""
    count: int
    """Norms that entered the summary."""
    by_chunk: list[float] = field(default_factory=list)
    """Mean per chunk of the sequence, in order."""


@dataclass(kw_only=True)
class Throughput:
    """Speed of a stage's compute account, over all devices."""

    tokens_per_second: float
    seconds_per_1k_tokens: float
    flop_per_token: float
    """Analytic count (``ttt_lit/ttt/flops.py``)."""
    flop_per_second: float
    peak_memory_gib: float | None = None
    """Rank 0's: allocated by the stage on a GPU, resident in the process so far on a CPU."""


@dataclass(kw_only=True)
class Damage:
    """Loss of the stage's network minus that of the imported model on the same held-out tokens, in nats per token; null where it is not
    finite."""

    when: Literal["start", "end"]
    """``start`` or ``end`` of the stage."""
    context: Literal["short", "long"]
    """``short`` or ``long``."""
    inner: Literal["on", "off"]
    """``on`` or ``off``."""
    inside: float | None
    """Mean over the positions inside the stage's window."""
    beyond: float | None
    """Mean over those beyond it; null, too, where the window with its sinks spans the context."""
    nats: float | None
    """Mean over all positions."""


@dataclass(kw_only=True)
class Imported:
    """The imported model's own loss on the held-out blocks that damage is measured on."""

    context: Literal["short", "long"]
    """``short`` or ``long``."""
    blocks: int
    tokens: int
    """Over all blocks."""
    nats_per_token: float
    """Mean over all tokens."""
    buckets: list[Bucket]
    """Loss by position, log-spaced, from 0 to the context without gaps."""


@dataclass(kw_only=True)
class Ceiling:
    """Worth of the context beyond a window to the imported dense model: its loss on fresh contexts of the last tokens minus that at full
    length, so the most that a memory of what lies further back can win on these data. As ``python cli.py probe`` measured it."""

    window: int
    """Tokens that the model still saw, at least."""
    stride: int
    """A token was read with its last ``window`` … ``window + stride`` tokens."""
    nats: float
    """Mean over the tokens, nats per token."""
    low: float | None
    """95 % interval, bootstrap over documents; null: a single document gives none."""
    high: float | None
    blocks: int
    """Held-out blocks that were read."""
    documents: int
    """From which they were cut."""
    checkpoint: str
    """Name and the hash's first digits of the model that was probed."""
    digest: str = field(default="", metadata=ADDED_LATER)
    """SHA-256 that identifies its weights, as ``weights_hash`` of a start that is this model; empty: not known."""


@dataclass(kw_only=True)
class EvaluationPoint:
    """One point of the series on a fixed subset, for cost to a target loss."""

    stage: str
    tokens: int
    """Trained so far in the run."""
    gpu_seconds: float
    """Compute device-seconds so far in the run."""
    inner_on: float | None = None
    """Loss on the fixed subset, inner loop on."""
    inner_off: float | None = None
    """The same with the inner loop off."""
