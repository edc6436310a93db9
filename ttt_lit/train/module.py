"""The LightningModule: it owns the network, the stages and the ledger, and does one optimiser step exactly.

Callbacks decide when a stage is entered and write down what happened; loss, inner loop, schedules and clipping are here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ttt_lit.convert.fast_mlp import TTTConfig
from ttt_lit.data.stream import StreamRequest, TokenDataModule
from ttt_lit.metrics import Inner
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.train.budget import Budget
from ttt_lit.train.ceiling import read_ceiling
from ttt_lit.train.checks import check_callbacks, check_data, check_stages, check_strategy, check_validation
from ttt_lit.train.evaluation import (
    Evaluation,
    ValidationConfig,
    evaluation_modes,
    headline_inner,
    target_bytes,
)
from ttt_lit.train.history import History
from ttt_lit.train.ledger import Ledger
from ttt_lit.train.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    group_names,
    is_prime,
    load_moments,
    set_lr,
)
from ttt_lit.train.parallel import data_mesh, fill, reshard, shard
from ttt_lit.train.position import block_ids
from ttt_lit.train.requests import held_out_request, training_request
from ttt_lit.train.run_config import RunConfig
from ttt_lit.train.stage_flops import stage_flops
from ttt_lit.train.stages import Context, SizeConfig, StagePlan, Stages, plan_stages
from ttt_lit.train.start import Start, StartConfig, resolve_start
from ttt_lit.train.teacher import Teacher, make_teacher
from ttt_lit.train.window import StepReport, StepWindow
from ttt_lit.ttt.inner import InnerLoop
from ttt_lit.ttt.model import TTTModel
from ttt_lit.ttt.scan import SequenceLoss, Teaching
from ttt_lit.ttt.settings import EngineConfig


class TTTModule(L.LightningModule):
    """Trains one run of stages.

    Args:
        start: the weights that the run begins with.
        stages: which stages it has.
        size: how big they are, in tokens.
        budget: what it may consume.
        ttt: which layers learn while reading; null for a model without prime MLPs.
        inner: the inner loop.
        optim: the outer optimiser.
        validation: what is measured, when.
        engine: how the gradient is computed: memory against computation.
    """

    def __init__(
        self,
        start: StartConfig,
        stages: Stages,
        size: SizeConfig,
        budget: Budget,
        ttt: TTTConfig | None = None,
        inner: InnerLoop = InnerLoop(),  # noqa: B008 (frozen)
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        validation: ValidationConfig = ValidationConfig(),  # noqa: B008 (frozen)
        engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.start_config, self.stages, self.size, self.budget = start, stages, size, budget
        self.ttt, self.inner, self.optim = ttt, inner, optim
        self.validation, self.engine = validation, engine
        self.plans: tuple[StagePlan, ...] = ()
        self.entered = -1
        """Index of the stage whose one-time entry is done; saved with the run."""
        self.run = RunConfig(experiment="unnamed")
        """What the run is called, and what it is in a comparison."""
        self.run_config: dict[str, Any] = {}
        """The resolved configuration, for the record."""
        self.validate_stage = 0
        """Stage in which a checkpoint is measured outside of training."""
        self.fraction = 0.0
        """Share of the stage's budget that was spent when the current optimiser step began, the same on every rank."""
        self.report: StepReport | None = None
        """The last optimiser step, the same on every rank."""
        self.history = History()
        """What the run has seen so far; saved with the run."""
        self._start: Start | None = None
        self._model: TTTModel | None = None
        self._teacher: list[Teacher] = []
        """Of the stage, at most one; in a list, which torch does not search for modules: it is neither trained nor saved."""
        self._ledger_state: dict[str, Any] | None = None

    # Assembly -----------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.plans = plan_stages(self.stages, self.size, self.budget, devices=self.trainer.world_size)
        if self._start is None:
            self._start = resolve_start(self.start_config, self.ttt)
        check_strategy(self.trainer)
        if stage == "fit":
            check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        used = self.plans if stage == "fit" else (self.plans[self.validate_stage],)
        check_stages(used, self.start, self.start_config, self.inner, self.size)
        damaged = self.damage_contexts if stage == "fit" else ()
        check_data(self.datamodule, self.start, self.plans, self.size, damaged)
        check_validation(self.datamodule, self.validation, self.size, damaged, world_size=self.trainer.world_size)
        last = self.stage_spec(self.plans[-1])
        self.ceiling = read_ceiling(self.validation, self.datamodule, self.start.origin, last)
        self.headline = headline_inner(self.validation, self.plans[-1].config.mode, can_update=self.has_inner_loop)
        self.ledger = Ledger(devices=self.trainer.world_size)
        if self._ledger_state is not None:
            self.ledger.load_state_dict(self._ledger_state)
        self.window = StepWindow()
        self.evaluation = self.new_evaluation()
        self._tables = {name: self.datamodule.token_bytes(name) for name in self._datasets()}

    def configure_model(self) -> None:
        if self._model is not None:
            return
        with torch.device("meta"):
            model = TTTModel(Decoder(self.start.spec), self.engine)
        check_strategy(self.trainer)
        mesh = data_mesh(self)
        if mesh is not None:
            shard(model, mesh)
        model.to_empty(device=self.trainer.strategy.root_device)
        fill(model.decoder, self.start.state)
        self._start = dataclasses.replace(self.start, state={})  # random weights would stay in memory a second time
        self._model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.model.decoder.named_parameters(), self.optim)
        if self.start.optimizer is not None:
            load_moments(optimizer, self.model.decoder.named_parameters(), self.start.optimizer)
            self._start = dataclasses.replace(self.start, optimizer=None)
        return optimizer

    @property
    def start(self) -> Start:
        assert self._start is not None, "setup has not run"
        return self._start

    @property
    def model(self) -> TTTModel:
        assert self._model is not None, "configure_model has not run"
        return self._model

    @property
    def datamodule(self) -> TokenDataModule:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def has_inner_loop(self) -> bool:
        return bool(self.start.spec.ttt_layers)

    @property
    def came_with_prime(self) -> bool:
        """Whether the start checkpoint had the prime MLPs already."""
        return self.has_inner_loop and not any(map(is_prime, self.start.added))

    # Stages -------------------------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> StagePlan:
        """The stage that the network is in."""
        assert self.entered >= 0, "no stage has been entered: the StageTransition callback is missing"
        return self.plans[self.entered]

    def stage_spec(self, plan: StagePlan) -> ModelSpec:
        """The network's description in a stage: the start's, with the stage's window."""
        return plan.network(self.start.spec)

    def enter_stage(self, index: int) -> None:
        """Put the network and the trainer into a stage. Repeating it (resume) changes nothing."""
        plan = self.plans[index]
        self.model.decoder.set_spec(self.stage_spec(plan))
        self.trainer.accumulate_grad_batches = plan.accumulate
        self.entered = index
        if not plan.config.teacher_kl:
            self._teacher = []
        elif (
            not self._teacher and self.ledger.stage == plan.name
        ):  # trained on: not validated, and not over when a run was resumed
            origin, mesh = self.start.origin, data_mesh(self)
            with self.ledger.account("checkpoint"):
                self._teacher = [make_teacher(origin, self.trainer, mesh, compiled=self.engine.compile)]

    @property
    def at_boundary(self) -> bool:
        """Whether the micro-batches counted so far are whole optimiser steps."""
        return self.ledger.spent(self.plan.name).micro_batches % self.plan.accumulate == 0

    def spent_fraction(self) -> float:
        """Share of the current stage's budget that is spent, at most 1; rank 0's where time decides (then a collective call)."""
        fraction = min(1.0, self.ledger.spent_fraction(self.plan.name, self.plan.budget))
        if self.plan.budget.seconds is None:
            return fraction
        return float(self.trainer.strategy.broadcast(fraction))

    def is_spent(self, plan: StagePlan) -> bool:
        """Whether a stage's budget is spent; where time decides, rank 0's clock decides for all (a collective call).

        Asked by the stream too, which is opened, and read one batch ahead, before its stage is entered.
        """
        spent = self.ledger.stage_spent(plan.name, plan.budget)
        return spent if plan.budget.seconds is None else bool(self.trainer.strategy.broadcast(spent))

    def flop_per_token(self) -> float:
        """Analytic training FLOPs per token of the current stage, under the engine's policy."""
        plan = self.plan
        teacher = self.start.origin.spec if plan.config.teacher_kl else None
        precision = self.trainer.precision
        return stage_flops(self.stage_spec(plan), plan, self.engine, precision=precision, teacher=teacher).total

    # Data ---------------------------------------------------------------------------------------------------------------------

    def _datasets(self) -> set[str]:
        return {plan.config.context for plan in self.plans} | {"long"}

    def train_request(self, index: int) -> StreamRequest:
        """What the data module streams in a stage, from where the ledger says that the stage stands."""
        plan = self.plans[index]
        spent = self.ledger.spent(plan.name).micro_batches
        return training_request(plan, spent, should_stop=lambda: self.is_spent(plan))

    def held_out(self, sequences: int) -> StreamRequest:
        """A few held-out long blocks, the same for any number of ranks when opened for one."""
        return StreamRequest(
            dataset="long", split="validation", block_tokens=self.size.long + 1, batch_size=1, num_batches=sequences
        )

    def validation_request(self, blocks: int | None = None, context: Context = "long") -> StreamRequest:
        """``blocks`` held-out blocks (default: all that a stage end measures), the same for every stage, arm and rank count."""
        count = blocks or self.validation.blocks
        return held_out_request(self.size, context, count, world_size=self.trainer.world_size)

    # Training -----------------------------------------------------------------------------------------------------------------

    def read(self, tokens: Tensor, *, mode: Mode, inner_lr: float, teacher: Teaching | None = None) -> SequenceLoss:
        """Token losses of tokens (B, T+1) in the current stage's network."""
        out: SequenceLoss = self.model(
            tokens,
            mode=mode,
            chunk=self.size.chunk,
            inner_lr=inner_lr,
            clip=self.inner.clip,
            rule=self.inner.rule,
            teacher=teacher,
        )
        if not torch.is_grad_enabled():
            reshard(self.model)
        return out

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.at_boundary:
            return
        config, fraction = self.plan.config, self.spent_fraction()
        self.fraction = fraction
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        self.rates = {group: config.schedule.lr(config.peak_lr(group), fraction) for group in group_names(optimizer)}
        # As in the reference, the inner warm-up counts the step that is being taken.
        step = 1 / self.plan.budget.steps if self.plan.budget.steps is not None else 0.0
        self.inner_lr = config.inner_schedule.lr(self.inner.lr, min(1.0, fraction + step))
        set_lr(optimizer, self.rates)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        config, tokens = self.plan.config, batch["tokens"]
        teacher = self._teacher[0](tokens) if self._teacher else None
        out = self.read(tokens, mode=config.mode, inner_lr=self.inner_lr, teacher=teacher)
        self.window.add(out, target_bytes(tokens, self._tables[config.context]).sum())
        return (
            out.loss if out.token_kl is None else out.loss + config.teacher_kl * out.token_kl.mean(dtype=torch.float64)
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.window.grad_norm = clip_gradients(self.model.parameters(), self.optim.clip_norm)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.report = self.window.close(rates=self.rates, inner_lr=self.inner_lr)

    # Validation ---------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.measure(batch, self.evaluation)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self.enter_stage(self.validate_stage)
        self.evaluation.reset()

    def new_evaluation(self) -> Evaluation:
        """Empty sums for one pass over held-out long blocks."""
        return Evaluation(self.size.long, short=self.size.short, has_inner_loop=self.has_inner_loop)

    def evaluation_modes(self) -> dict[Inner, Mode]:
        """In which mode each setting of the inner loop that the stage has is measured."""
        return evaluation_modes(self.plan.config.mode, has_inner_loop=self.has_inner_loop)

    @property
    def damage_contexts(self) -> tuple[Context, ...]:
        """Where damage is measured: nowhere unless the run starts from a model as imported; on short blocks if it has short documents."""
        origin = self.start.origin
        if not (self.validation.damage_blocks and origin.checkpoint is not None and origin.as_imported):
            return ()
        return ("short", "long") if self.datamodule.folders["short"] is not None else ("long",)

    def measure(self, batch: dict[str, Tensor], evaluation: Evaluation) -> None:
        """Add the losses of held-out long blocks under every setting of the inner loop that the stage has, at its full rate.

        ``batch`` holds tokens (B, T+1) and source (B,), as the data module streams them.
        """
        tokens = batch["tokens"].to(self.device)
        losses: dict[Inner, Tensor] = {
            inner: self.read(tokens, mode=mode, inner_lr=self.inner.lr).token_nll
            for inner, mode in self.evaluation_modes().items()
        }
        self.add_losses(evaluation, losses, batch)

    def add_losses(self, evaluation: Evaluation, losses: dict[Inner, Tensor], batch: dict[str, Tensor]) -> None:
        """Add token losses (B, T) of held-out long blocks, measured in whatever way, with what identifies the blocks."""
        tokens = batch["tokens"]
        num_bytes = target_bytes(tokens, self._tables["long"])
        evaluation.update(losses, num_bytes, block_ids(tokens), batch["source"])

    # State --------------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ttt_lit"] = {
            "entered": self.entered,
            "ledger": self.ledger.state_dict(),
            "history": self.history.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["ttt_lit"]
        self.entered, self._ledger_state = saved["entered"], saved["ledger"]
        self.history.load_state_dict(saved["history"])
        if hasattr(self, "ledger"):
            self.ledger.load_state_dict(saved["ledger"])
