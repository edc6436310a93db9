"""Keeps ``record.json`` of the run up to date: the one file that every report is made from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ttt_lit.ops.attention import kernels_that_ran
from ttt_lit.record import schema
from ttt_lit.record.codec import NotFinite
from ttt_lit.record.measured import Ceiling, Imported, Norms, Throughput
from ttt_lit.train.divergence import Diverged
from ttt_lit.train.evaluation import bucketed
from ttt_lit.train.module import TTTModule
from ttt_lit.train.origin import parents
from ttt_lit.train.stages import Context, StagePlan
from ttt_lit.train.transition import conversion

_PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "litdata", "safetensors", "numpy")


class RunRecorder(L.Callback):
    """Writes the record at the start, at every stage boundary and at the end, whatever the end is."""

    def __init__(self) -> None:
        self.started = _now()
        self.unigram_entropy: float | None = None
        self.flops: dict[str, float] = {}
        """Stage name → analytic training FLOPs per token."""

    def on_fit_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        # It reads the whole held-out split. A run that is continued starts its clock before any callback's on_train_start.
        if trainer.is_global_zero:
            self.unigram_entropy = module.datamodule.unigram_entropy("long")

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._write(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module: TTTModule, *_: Any) -> None:  # type: ignore[override]
        if module.plan.name not in self.flops:
            self.flops[module.plan.name] = module.flop_per_token()

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._write(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        """Also reached by a resume that finds every stage done: a run that was lost between its last save and here."""
        incomplete = [plan.name for plan in module.plans if not module.history.stage(plan.name).validations]
        if incomplete:
            self._write(
                trainer, module, status="failed", reason=f"ended before stage {', '.join(incomplete)} was complete"
            )
        else:
            self._write(trainer, module, status="finished")

    def on_exception(self, trainer: L.Trainer, module: TTTModule, exception: BaseException) -> None:  # type: ignore[override]
        if not hasattr(module, "ledger") or module._model is None:
            return  # nothing has run, so there is nothing to record
        status, reason = _ending(exception)
        try:
            module.ledger.stop()
            try:
                self._write(trainer, module, status=status, reason=reason)
            except NotFinite as number:  # measured, but the run stopped for another reason before it was judged
                status, reason = "diverged", f"{number.where} is {number.value}; {reason}"
                self._write(trainer, module, status=status, reason=reason)
        except Exception as failure:  # whatever it is: what ended the run must not be hidden by it
            if trainer.is_global_zero:
                _end_last_record(_path(trainer), status, reason, failure)

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "flops": self.flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started, self.flops = state["started"], state["flops"]

    def _write(
        self, trainer: L.Trainer, module: TTTModule, *, status: schema.Status = "running", reason: str | None = None
    ) -> None:
        if not trainer.is_global_zero:
            return
        start, run = module.start, module.run
        record = schema.RunRecord(
            run_id=run.id,
            experiment=run.experiment,
            role=run.role,
            variant=run.variant,
            share=run.share,
            seed=module.start_config.seed,
            headline=module.headline,
            status=status,
            reason=reason,
            started=self.started,
            ended=None if status == "running" else _now(),
            config=_spelt(module.run_config),
            start=schema.Start(
                source=module.start_config.init_from if module.start_config.init == "checkpoint" else None,
                weights_hash=start.origin.weights_hash,
                lineage=[vars(step) for step in start.origin.lineage],
                receipt=start.receipt.counts(),
            ),
            model=schema.Model(
                family=start.origin.family,
                num_parameters=start.spec.num_parameters(),
                num_layers=start.spec.num_layers,
                ttt_layers=list(start.spec.ttt_layers),
                spec=json.loads(start.spec.to_json()),
            ),
            data=_data(module),
            environment=_environment(trainer),
            git=_git(),
            start_validation=module.history.start_validation,
            imported=[_imported(module, context, curve) for context, curve in module.history.imported.items()],
            stages=[self._stage(module, plan) for plan in module.plans],
            evaluations=module.history.evaluations,
            totals=module.ledger.total(),
            unigram_entropy=self.unigram_entropy,
            parents=[schema.Parent(**parent) for parent in parents(start.origin.lineage)],
            ceiling=[Ceiling(**ceiling) for ceiling in module.ceiling],
        )
        record.write(_path(trainer))

    def _stage(self, module: TTTModule, plan: StagePlan) -> schema.Stage:
        seen, spent = module.history.stages.get(plan.name), module.ledger.spent(plan.name)
        stage = schema.Stage(
            name=plan.name,
            mode=plan.config.mode,
            context=plan.context,
            windows=[layer.window for layer in module.stage_spec(plan).layers],
            sink_tokens=plan.sink_tokens,
            planned=schema.Planned(
                optimizer_steps=plan.budget.steps, tokens=plan.tokens, gpu_seconds=plan.budget.seconds
            ),
            spent=spent,
            carry=plan.config.carry,
        )
        if seen is None:
            return stage
        if seen.transition is not None:  # resume files of before do not know its words
            stage.transition = dataclasses.replace(seen.transition, kind=conversion(plan))
        if seen.losses:
            last = seen.losses[-max(1, len(seen.losses) // 10) :]
            stage.train_loss_first = seen.losses[0]
            stage.train_loss_mean = sum(seen.losses) / len(seen.losses)
            stage.train_loss_last_tenth = sum(last) / len(last)
            stage.train_losses, stage.train_gpu_seconds = list(seen.losses), list(seen.gpu_seconds)
        stage.validations, stage.damage = seen.validations, seen.damage
        if seen.norm_range:
            by_chunk = seen.update_norm_by_chunk
            low, high, last_norm = seen.norm_range
            stage.inner_update_norms = Norms(
                mean=sum(by_chunk) / len(by_chunk),
                minimum=low,
                maximum=high,
                last=last_norm,
                count=len(seen.losses) * len(by_chunk),
                by_chunk=by_chunk,
            )
        wall = spent.gpu_seconds["compute"] / module.ledger.devices
        if wall > 0 and spent.tokens and plan.name in self.flops:
            rate = spent.tokens / wall
            stage.throughput = Throughput(
                tokens_per_second=rate,
                seconds_per_1k_tokens=1000 / rate,
                flop_per_token=self.flops[plan.name],
                flop_per_second=rate * self.flops[plan.name],
                peak_memory_gib=seen.peak_gib or None,
            )
        return stage


def _path(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / schema.RECORD_NAME


def _ending(exception: BaseException) -> tuple[schema.Status, str]:
    """Status and reason of a run that this ended."""
    if isinstance(exception, NotFinite):  # a resume file may bring a number that was never judged
        return "diverged", f"{exception.where} is {exception.value}"
    if isinstance(exception, SIGTERMException):
        return "interrupted", "told to stop by a signal"
    if isinstance(exception, KeyboardInterrupt):
        return "interrupted", "stopped at once by Ctrl-C"
    reason = " ".join(str(exception).split()) or type(exception).__name__
    return ("diverged" if isinstance(exception, Diverged) else "failed"), reason


def _end_last_record(path: Path, status: schema.Status, reason: str, failure: Exception) -> None:
    """Let the record on disk at least say how the run ended, where a whole one cannot be made. Never an error itself."""
    lost = f"the record could not be completed ({' '.join(f'{type(failure).__name__}: {failure}'.split())})"
    try:
        record = schema.RunRecord.read(path)
        record.status, record.reason, record.ended = status, f"{reason}; {lost}", _now()
        record.write(path)
    except Exception as again:
        lost = f"{lost}, nor ended ({' '.join(str(again).split())})"
    print(f"{path}: {lost}", file=sys.stderr, flush=True)


def _spelt(config: Any) -> Any:
    """The configuration with infinite numbers as YAML spells them: JSON has none."""
    if isinstance(config, dict):
        return {key: _spelt(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_spelt(value) for value in config]
    if isinstance(config, float) and math.isinf(config):
        return ".inf" if config > 0 else "-.inf"
    return config


def _imported(module: TTTModule, context: Context, curve: list[float]) -> Imported:
    blocks = module.validation.damage_blocks
    return Imported(
        context=context,
        blocks=blocks,
        tokens=blocks * len(curve),
        nats_per_token=sum(curve) / len(curve),
        buckets=bucketed(torch.tensor(curve, dtype=torch.float64)),
    )


def _data(module: TTTModule) -> schema.Data:
    reads_short = any(plan.config.context == "short" for plan in module.plans) or "short" in module.history.imported
    return schema.Data(
        tokenizer=module.start.origin.tokenizer_hash,
        short=module.datamodule.identity("short") if reads_short else None,
        long=module.datamodule.identity("long"),
    )


def _environment(trainer: L.Trainer) -> schema.Environment:
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    # The strategy's: at the end of a run Lightning has moved the module to the CPU.
    root = trainer.strategy.root_device
    device = torch.cuda.get_device_name(root) if root.type == "cuda" else platform.machine() + " cpu"
    return schema.Environment(
        versions=versions, device=device, num_devices=trainer.world_size, kernels=sorted(kernels_that_ran)
    )


def _git() -> schema.Git:
    root = Path(__file__).resolve().parents[1]

    def run(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    status = run("status", "--porcelain")
    return schema.Git(revision=run("rev-parse", "HEAD"), dirty=None if status is None else bool(status))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
