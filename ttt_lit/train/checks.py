"""What must fit together before a run trains its first token. Every mistake is a ValueError in one line, at once, not hours later."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from ttt_lit.data.stream import TokenDataModule
from ttt_lit.train.evaluation import ValidationConfig
from ttt_lit.train.optim import group_of, learns
from ttt_lit.train.requests import held_out_request
from ttt_lit.train.stages import Context, SizeConfig, StagePlan
from ttt_lit.train.start import Start, StartConfig
from ttt_lit.train.teacher import check_teacher
from ttt_lit.ttt.inner import InnerLoop

# The ledger counts before anyone reads it; a stage is entered before it is watched; a record is complete before it is saved.
REQUIRED_CALLBACKS: tuple[str, ...] = (
    *("FairnessBudget", "StartValidation", "StageTransition", "DamageLog", "StepLog", "DivergenceGuard"),
    *("PeriodicEvaluation", "PositionLossLogger", "StageCheckpoint", "RunRecorder"),
)


def check_strategy(trainer: L.Trainer) -> None:
    """Several devices mean FSDP2 over all of them: other strategies lose gradients, or train several models."""
    world, strategy = trainer.world_size, trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        if world > 1:
            raise ValueError(
                f"trainer.strategy: got {type(strategy).__name__} on {world} devices, which loses gradients of parameters that a "
                "stage does not use; set --trainer.strategy fsdp2"
            )
        return
    mesh = strategy.device_mesh
    if mesh is not None and (mesh["data_parallel"].size() != world or mesh["tensor_parallel"].size() != 1):
        raise ValueError(
            f"trainer.strategy: got a {mesh['data_parallel'].size()} × {mesh['tensor_parallel'].size()} mesh (data × tensor), expected "
            f"{world} × 1; set --trainer.strategy fsdp2"
        )


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """A run needs its callbacks, in the order of configs/base.yaml."""
    names = [type(callback).__name__ for callback in callbacks]
    ours = [name for name in names if name in REQUIRED_CALLBACKS]
    if ours != list(REQUIRED_CALLBACKS):
        raise ValueError(
            f"trainer.callbacks: got {', '.join(ours) or 'none of ours'}, expected {', '.join(REQUIRED_CALLBACKS)} in this order; add "
            "callbacks with --trainer.callbacks+= instead of replacing the list"
        )


def check_steps(plans: Sequence[StagePlan]) -> None:
    """Every stage trains something."""
    for plan in plans:
        if plan.budget.steps == 1 and plan.config.schedule.warmup_share > 0:
            raise ValueError(
                f"stage {plan.name}: gets a single optimiser step, whose learning rate is 0 by the warm-up, so nothing would be trained; "
                "raise its share or the budget, or set schedule.warmup_share: 0"
            )


def check_stages(
    plans: Sequence[StagePlan], start: Start, config: StartConfig, inner: InnerLoop, size: SizeConfig
) -> None:
    """Modes need TTT layers and a rate, kept layers must exist, and the validation context needs whole chunks."""
    check_steps(plans)
    for plan in plans:
        mode = plan.config.mode
        unknown = sorted(set(plan.full_attention_layers) - set(range(start.spec.num_layers)))
        if unknown:
            raise ValueError(
                f"stage {plan.name}: full_attention_layers: got {unknown}, expected layer indices from 0 to {start.spec.num_layers - 1}"
            )
        updated = plan.config.updated_layers
        if updated is not None and (not updated or set(updated) - set(start.spec.ttt_layers)):
            raise ValueError(
                f"stage {plan.name}: updated_layers: got {updated}, expected some of the run's TTT layers {list(start.spec.ttt_layers)}"
            )
        if plan.config.teacher_kl:
            if config.init == "scratch":
                raise ValueError(
                    f"stage {plan.name}: teacher_kl {plan.config.teacher_kl:g}: a run from random weights has no imported model to learn "
                    "from; set teacher_kl: 0"
                )
            check_teacher(start.origin)
        if plan.config.new_lr is not None:
            _check_new_lr(plan, start, config)
        if mode != "none" and not start.spec.ttt_layers:
            raise ValueError(f"stage {plan.name}: mode {mode} needs TTT layers; set model.ttt")
        if mode in ("meta", "first_order") and inner.lr == 0:
            raise ValueError(f"stage {plan.name}: mode {mode} with inner.lr 0 updates nothing; use mode static")
    if start.spec.ttt_layers and size.long % size.chunk:
        raise ValueError(
            f"size.long {size.long} is not a multiple of size.chunk {size.chunk}: validation reads it in chunks"
        )
    if config.load == "all" and plans[0].config.carry != "all":
        raise ValueError(
            f"model.start: load all has no effect with carry params in stage {plans[0].name}; set carry: all"
        )


def check_validation(
    data: TokenDataModule,
    config: ValidationConfig,
    size: SizeConfig,
    damage_contexts: Sequence[Context],
    *,
    world_size: int,
) -> None:
    """Every request of held-out blocks must be served, or a run would find out at its first stage end."""
    wanted: list[tuple[str, Context]] = [("blocks", "long"), ("subset", "long")]
    for name, context in wanted + [("damage_blocks", context) for context in damage_contexts]:
        try:
            request = held_out_request(size, context, getattr(config, name), world_size=world_size)
            data.open(request, world_size=world_size)
        except ValueError as error:
            raise ValueError(f"model.validation.{name}: {error}") from error


def _check_new_lr(plan: StagePlan, start: Start, config: StartConfig) -> None:
    what = f"stage {plan.name}: new_lr {plan.config.new_lr:g} has no effect"
    if config.init == "scratch":
        raise ValueError(f"{what} in a run from random weights, where everything is new: set lr, and new_lr: null")
    if not any(group_of(name) != "base" and learns(name, plan.config.mode) for name in start.spec.parameter_shapes()):
        raise ValueError(
            f"{what}: with mode {plan.config.mode} the stage trains nothing that is not the imported model's; set new_lr: null"
        )


def check_data(
    data: TokenDataModule,
    start: Start,
    plans: Sequence[StagePlan],
    size: SizeConfig,
    damage_contexts: Sequence[Context],
) -> None:
    """The shards are the model's, and long ones hold blocks that cross no document."""
    if start.origin.tokenizer_hash is None:
        raise ValueError(
            "model.start.init_from: the checkpoint has no tokenizer, so nothing tells whether the data are its own; import it from a "
            "folder that holds its tokenizer"
        )
    data.check_model(start.spec.vocab_size, start.origin.tokenizer_hash)
    long = data.manifest("long")
    if long.layout != "per_document" or long.context != size.long:
        raise ValueError(
            f"data.long: {data.folders['long']} is {long.layout} with context {long.context}, expected per_document with context "
            f"{size.long} (size.long), so that no block crosses a document; prepare it so"
        )
    if "short" in damage_contexts or any(plan.config.context == "short" for plan in plans):
        short = data.manifest("short")
        if short.context < size.short:
            raise ValueError(
                f"data.short: {data.folders['short']} has documents of {short.context} tokens and more, expected at least {size.short} "
                "(size.short); prepare it with that context"
            )
