"""What a run does, as data: stages (which), a size (how much) and a budget, resolved to plain numbers before anything starts.

An experiment names stages by attention, mode, context and share; a size gives tokens. So one file of a dozen numbers shrinks every
experiment together, ratios kept. Standard library and specs only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.train.budget import Budget, StageBudget, split_budget
from ttt_lit.train.schedule import InnerLRSchedule, LRSchedule

if TYPE_CHECKING:  # torch stands behind it
    from ttt_lit.train.optim import Group

Context = Literal["short", "long"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of a run with one attention policy, one inner-loop mode, one context, one dataset and one share of the budget."""

    enabled: bool = True
    """Whether the run has this stage."""
    attention: Literal["dense", "window"] = "window"
    """``dense``: windows as the checkpoint has them. ``window``: no layer sees further than ``window_share`` × size.window."""
    window_share: float = 1.0
    """Window as a share of size.window."""
    sink_tokens: int | None = None
    """Tokens from the first on that stay visible outside of the window in the full-attention layers that the stage narrows. null: as
    many as size.sink_tokens."""
    full_attention_layers: list[int] | None = None
    """Layers, by index, that keep the window that the checkpoint gives them, without sinks. null: those of size.full_attention_layers."""
    mode: Mode = "none"
    """What the inner loop does in training: none, static, meta or first_order."""
    updated_layers: list[int] | None = None
    """The TTT layers, by index, that learn while reading in this stage; null: all of the run's. The prime MLPs of the others are computed
    and trained, but never updated inside: so a stage may begin with some layers, and a later one convert the rest."""
    context: Context = "short"
    """Length of the training sequences, and the data set they come from."""
    share: float | None = None
    """Share of the run's budget. null: what the other stages leave (one stage at most)."""
    carry: Literal["all", "params"] = "params"
    """``params``: the optimiser starts afresh. ``all``: its moments and step counts are carried from the stage before."""
    lr: float = 3e-4
    """Peak outer learning rate of everything that was imported; in a run from random weights, of everything."""
    new_lr: float | None = None
    """Peak outer learning rate of what the run adds to an imported model: prime MLPs with their norms, learned sinks. null: ``lr``."""
    teacher_kl: float = 0.0
    """Weight of KL(imported model ‖ network) per token, added to the loss: the imported dense model, frozen, reads the same tokens. For
    modes ``none`` and ``static``. 0: no teacher."""
    schedule: LRSchedule = field(default_factory=lambda: LRSchedule(warmup_share=0.1))
    """Outer learning rate over the share of the stage's budget that is spent."""
    inner_schedule: InnerLRSchedule = field(default_factory=InnerLRSchedule)
    """Inner learning rate over the share of the stage's budget that is spent. For modes that update."""

    def __post_init__(self) -> None:
        if not 0 < self.window_share <= 1:
            raise ValueError(f"stages: window_share: got {self.window_share}, expected more than 0 and at most 1")
        if self.updated_layers is not None and self.mode not in ("meta", "first_order"):
            raise ValueError(
                f"stages: updated_layers {self.updated_layers} has no effect with mode {self.mode}; remove it, or set mode meta"
            )
        if self.inner_schedule != InnerLRSchedule() and self.mode not in ("meta", "first_order"):
            raise ValueError(
                f"stages: inner_schedule {dataclasses.asdict(self.inner_schedule)} has no effect with mode {self.mode}; set "
                "inner_schedule: {warmup_share: 0.0, initial_ratio: 0.0}, or mode meta"
            )
        if not self.teacher_kl >= 0 or self.teacher_kl == float("inf"):
            raise ValueError(f"stages: teacher_kl: got {self.teacher_kl}, expected a weight of 0 (no teacher) or more")
        if self.teacher_kl and self.mode not in ("none", "static"):
            raise ValueError(
                f"stages: teacher_kl {self.teacher_kl:g} with mode {self.mode}: a network that learns while reading has no teacher; set "
                "teacher_kl: 0, or mode none or static"
            )
        if self.sink_tokens is not None and self.sink_tokens < 0:
            raise ValueError(
                f"stages: sink_tokens: got {self.sink_tokens}, expected 0 or more tokens, or null for the size's"
            )
        if not (self.lr > 0 and (self.new_lr is None or self.new_lr >= 0)):
            raise ValueError(
                f"stages: got lr {self.lr} and new_lr {self.new_lr}, expected lr > 0 and new_lr >= 0 or null"
            )

    def peak_lr(self, group: Group) -> float:
        """Peak outer learning rate of a group of the optimiser."""
        new = self.lr if self.new_lr is None else self.new_lr
        rates: dict[Group, float] = {"base": self.lr, "prime": new, "sink": new}
        return rates[group]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The stages of a run, in this order. One optional field per stage is the form in which overlays merge field by field."""

    A: StageConfig | None = None
    """Training from scratch, or a control."""
    B0: StageConfig | None = None
    """Dense attention on the new data."""
    B1: StageConfig | None = None
    """Sliding window."""
    B2: StageConfig | None = None
    """TTT at the short context."""
    C: StageConfig | None = None
    """TTT at the long context."""

    def enabled(self) -> dict[str, StageConfig]:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        stages = {name: stage for name, stage in given.items() if stage is not None and stage.enabled}
        if not stages:
            raise ValueError("stages: no stage is enabled; set enabled: true for at least one of A, B0, B1, B2, C")
        return stages


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """How big an experiment is, in tokens."""

    short: int = 8192
    """The short context."""
    long: int = 32768
    """The long context."""
    chunk: int = 1024
    """Inner mini-batch."""
    window: int = 8192
    """Sliding window at window_share 1."""
    sink_tokens: int = 0
    """Tokens from the first on that stay visible, at their true distance, in every full-attention layer that a stage narrows (attention
    sinks)."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers, by index, that no stage narrows."""
    tokens_per_step: int = 524288
    """Tokens of one optimiser step over all ranks, the same in every stage of every arm."""
    micro_batch_tokens: int = 32768
    """Tokens that one device reads at a time; at least one sequence."""

    def __post_init__(self) -> None:
        tokens = ("short", "long", "chunk", "window", "tokens_per_step", "micro_batch_tokens")
        problems = [f"{name} is {getattr(self, name)}" for name in tokens if getattr(self, name) < 1]
        if problems:
            raise ValueError(f"size: {', '.join(problems)}, expected at least 1 token")
        if self.sink_tokens < 0:
            raise ValueError(f"size: sink_tokens is {self.sink_tokens}, expected 0 or more tokens")
        if self.long < self.short:
            raise ValueError(f"size: long {self.long} is shorter than short {self.short}")

    def context(self, which: Context) -> int:
        return self.short if which == "short" else self.long


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage in numbers."""

    name: str
    config: StageConfig
    context: int
    """Tokens per sequence."""
    window: int | None
    """Limit on every layer's window; None: windows as in the checkpoint."""
    sink_tokens: int
    """Sinks of the full-attention layers that the window narrows; 0 where none is."""
    full_attention_layers: tuple[int, ...]
    """Layers that keep their window where there is one."""
    chunk: int
    budget: StageBudget
    sequences: int
    """Sequences per rank and micro-batch."""
    accumulate: int
    """Micro-batches per optimiser step."""
    tokens_per_step: int

    def network(self, imported: ModelSpec) -> ModelSpec:
        """The network's description in this stage. ``imported``: the same with the windows that the checkpoint gives it."""
        spec = windowed(imported, self.window, sink_tokens=self.sink_tokens, keep=self.full_attention_layers)
        updated = self.config.updated_layers
        return spec if updated is None else spec.updating_only(frozenset(updated))

    @property
    def order(self) -> int:
        """The stage's number among all stages, enabled or not: C reads the same blocks in the same order in every arm."""
        return [stage.name for stage in dataclasses.fields(Stages)].index(self.name)

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches per rank in the whole stage; None where time decides."""
        return None if self.budget.steps is None else self.budget.steps * self.accumulate

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage over all ranks; None where time decides."""
        return None if self.budget.steps is None else self.budget.steps * self.tokens_per_step


def plan_stages(stages: Stages, size: SizeConfig, budget: Budget, *, devices: int) -> tuple[StagePlan, ...]:
    """Resolve a run to numbers. ValueError, naming the stage, for whatever does not divide or fit."""
    enabled = stages.enabled()
    budgets = split_budget(
        budget, tokens_per_step=size.tokens_per_step, shares={n: s.share for n, s in enabled.items()}
    )
    return tuple(_plan_stage(name, config, size, budgets[name], devices) for name, config in enabled.items())


def _plan_stage(name: str, config: StageConfig, size: SizeConfig, budget: StageBudget, devices: int) -> StagePlan:
    context = size.context(config.context)
    if config.mode in ("meta", "first_order"):
        if context % size.chunk:
            raise ValueError(
                f"stage {name}: context {context} is not a multiple of size.chunk {size.chunk}: choose one that divides it"
            )
        if context == size.chunk:
            raise ValueError(
                f"stage {name}: context {context} is a single chunk, so nothing would be learnt while reading; lower size.chunk"
            )
    sequences, accumulate = _micro_batches(name, context, size, devices)
    window, sinks, kept = _attention(name, config, size)
    return StagePlan(
        name=name,
        config=config,
        context=context,
        window=window,
        sink_tokens=sinks,
        full_attention_layers=kept,
        chunk=size.chunk,
        budget=budget,
        sequences=sequences,
        accumulate=accumulate,
        tokens_per_step=size.tokens_per_step,
    )


def _attention(name: str, config: StageConfig, size: SizeConfig) -> tuple[int | None, int, tuple[int, ...]]:
    """Window, sinks and kept layers of a stage. A window that spans the context may have them: long contexts are validated with it."""
    if config.attention == "dense":
        for setting, default in (("window_share", 1), ("sink_tokens", None), ("full_attention_layers", None)):
            if (value := getattr(config, setting)) != default:
                raise ValueError(
                    f"stage {name}: {setting} {value} has no effect with attention dense; remove one of them"
                )
        return None, 0, ()
    sinks = size.sink_tokens if config.sink_tokens is None else config.sink_tokens
    kept = size.full_attention_layers if config.full_attention_layers is None else config.full_attention_layers
    return max(1, round(config.window_share * size.window)), sinks, tuple(kept)


def _micro_batches(name: str, context: int, size: SizeConfig, devices: int) -> tuple[int, int]:
    """Sequences per rank and micro-batch, and micro-batches per step: as many sequences as fit, in equal micro-batches."""
    sequences, rest = divmod(size.tokens_per_step, context * devices)
    if rest or not sequences:
        raise ValueError(
            f"stage {name}: size.tokens_per_step {size.tokens_per_step} is not whole sequences of {context} tokens on {devices} "
            f"devices; use a multiple of {context * devices}"
        )
    fitting = max(1, min(sequences, size.micro_batch_tokens // context))
    per_batch = next(n for n in range(fitting, 0, -1) if sequences % n == 0)
    return per_batch, sequences // per_batch
