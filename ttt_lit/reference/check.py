"""Check this implementation against golden files of the official TTT-E2E reference.

The losses and gradients come from the code that ``fit`` trains with: ``TTTModel``, ``build_optimizer``, ``clip_gradients`` and the
schedules. Reading the file, the loop over its steps and the error measures live here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ttt_lit.checkpoint.tensors import shapes_of
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.reference.layout import spec_from_case, state_from_reference, state_to_reference, switched_off
from ttt_lit.train.optim import OptimConfig, build_optimizer, clip_gradients, group_names, set_lr
from ttt_lit.train.schedule import InnerLRSchedule, LRSchedule
from ttt_lit.ttt.model import TTTModel
from ttt_lit.ttt.settings import EngineConfig

LIMITS = {torch.float64: 1e-4, torch.float32: 1e-3}
FINAL_LIMIT = 1e-3

# The reference's outer optimiser in the training cases: linear warm-up over 2 steps, cosine to step 10, constant from there.
_PEAK_LR, _FINAL_LR, _WARMUP_STEPS, _DECAY_STEPS = 1e-3, 1e-5, 2, 10


@dataclass(frozen=True)
class Case:
    """A golden file in memory; tensors as stored (float32)."""

    name: str
    config: dict[str, Any]
    spec: ModelSpec
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @property
    def mode(self) -> Mode:
        if self.config["mode"] == "meta":
            return "meta"
        return "static" if self.config["prime"] else "none"


@dataclass(frozen=True)
class CaseErrors:
    """Relative errors ‖a − b‖ / ‖b‖ of one case at one precision; ``losses`` and ``final`` only where the case trains."""

    name: str
    dtype: torch.dtype
    loss: float
    nll: float
    grad: float
    worst: str
    losses: float | None = None
    final: float | None = None

    @property
    def passed(self) -> bool:
        limit = LIMITS[self.dtype]
        exact = [self.loss, self.nll, self.grad] + ([self.losses] if self.losses is not None else [])
        # Written so that a NaN fails.
        return all(error <= limit for error in exact) and (self.final is None or self.final <= FINAL_LIMIT)

    def fields(self) -> dict[str, str]:
        def shown(*names: str) -> dict[str, str]:
            return {f"{n}_err": f"{error:.1e}" for n in names if (error := getattr(self, n)) is not None}

        return shown("loss", "nll", "grad") | {"worst": self.worst} | shown("losses", "final")


def read_case(path: str | Path) -> Case:
    """Read a golden file. FileNotFoundError or ValueError in one line where it is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such golden file")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from error
    try:
        if "config" not in metadata:
            raise ValueError("its metadata holds no config")
        config = json.loads(metadata["config"])
        case = Case(path.stem, config, spec_from_case(config), tensors)
        _check_complete(case)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a golden file: {error}") from error
    return case


def _check_complete(case: Case) -> None:
    """ValueError for whatever would fail, or be left out, later."""
    config, tensors = case.config, case.tensors
    steps, chunk = int(config["steps"]), int(config["chunk"])
    float(config["ilr"]), float(config["clip"])
    wanted = {"tokens", "loss", "token_nll"} | ({"losses"} if steps > 1 else set())
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise ValueError(f"tensors {missing} are missing")
    shape, expected = tuple(tensors["tokens"].shape), (steps, int(config["batch"]), int(config["seq"]) + 1)
    if shape != expected:
        raise ValueError(f"tokens: got shape {shape}, expected {expected}")
    if not 0 <= int(tensors["tokens"].min()) <= int(tensors["tokens"].max()) < case.spec.vocab_size:
        raise ValueError(f"tokens: got ids outside 0 to {case.spec.vocab_size - 1}")
    if case.mode == "meta" and (chunk < 1 or config["seq"] % chunk):
        raise ValueError(f"chunk: got {chunk}, expected one that divides seq {config['seq']}")
    for prefix in ("weight.", "grad.", *(("final.",) if steps > 1 else ())):
        state_from_reference(case.spec, case.group(prefix))  # names and shapes


def check_case(case: Case, dtype: torch.dtype, *, engine: EngineConfig = EngineConfig()) -> CaseErrors:  # noqa: B008 (frozen)
    """Run one case in ``dtype`` under the engine's settings and measure its errors against the file."""
    model = _load(case, dtype, engine)
    tokens = case.tensors["tokens"].long()
    out = _forward(model, case, tokens[0], step=0)
    out.loss.backward()
    gradients = state_to_reference(case.spec, _gradients(model), shapes_of(case.group("grad.")))
    by_tensor = {name: error(gradients[name], stored) for name, stored in case.group("grad.").items()}
    worst = max(by_tensor, key=lambda name: _orderable(by_tensor[name]))
    losses = final = None
    if case.config["steps"] > 1:
        losses, final = _train(case, dtype, engine)
    return CaseErrors(
        name=case.name,
        dtype=dtype,
        loss=error(out.loss.reshape(1), case.tensors["loss"]),
        nll=error(out.token_nll, case.tensors["token_nll"]),
        grad=by_tensor[worst],
        worst=worst,
        losses=losses,
        final=final,
    )


def error(ours: Tensor, stored: Tensor) -> float:
    """‖ours − stored‖ / ‖stored‖ in float64; where the reference is exactly zero, anything else is infinitely wrong."""
    ours, stored = ours.detach().double(), stored.double()
    difference, size = torch.linalg.vector_norm(ours - stored).item(), torch.linalg.vector_norm(stored).item()
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / size


def check_reference(files: list[str]) -> int:
    """Check golden files in float64 and float32; one line a file. Returns the exit status: 1 if any error is above its limit."""
    failed = False
    for path in files:
        case = read_case(path)
        exact, single = (check_case(case, dtype) for dtype in (torch.float64, torch.float32))
        fields = exact.fields() | {
            f"float32_{name}": value for name, value in single.fields().items() if name != "worst"
        }
        passed = exact.passed and single.passed
        print(
            case.name, *(f"{name}={value}" for name, value in fields.items()), "ok" if passed else "FAILED", flush=True
        )
        failed |= not passed
    return int(failed)


def _load(case: Case, dtype: torch.dtype, engine: EngineConfig) -> TTTModel:
    with torch.device("meta"):
        decoder = Decoder(case.spec)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in case.group("weight.").items()}
    decoder.load_state_dict(state_from_reference(case.spec, weights), assign=True)
    return TTTModel(decoder, engine)


def _forward(model: TTTModel, case: Case, tokens: Tensor, *, step: int) -> Any:
    return model(
        tokens,
        mode=case.mode,
        chunk=case.config["chunk"],
        inner_lr=inner_lr(case.config, step),
        clip=case.config["clip"],
    )


def inner_lr(config: dict[str, Any], step: int) -> float:
    """The inner learning rate at outer step ``step`` of a case."""
    warmup, target = config.get("ilr_warmup", 0), config["ilr"]
    if not warmup or not target:
        return target
    steps = max(warmup, config["steps"])
    schedule = InnerLRSchedule(warmup_share=warmup / steps, initial_ratio=config["ilr_init"] / target)
    return schedule.lr(target, min(1.0, (step + 1) / steps))


def outer_lr(step: int) -> float:
    """The reference's outer learning rate at step 0, 1, …; the very first step has rate 0."""
    schedule = LRSchedule(warmup_share=_WARMUP_STEPS / _DECAY_STEPS, final_lr_ratio=_FINAL_LR / _PEAK_LR)
    return schedule.lr(_PEAK_LR, step / _DECAY_STEPS)


def _train(case: Case, dtype: torch.dtype, engine: EngineConfig) -> tuple[float, float]:
    model = _load(case, dtype, engine)
    initial = {name: tensor.to(torch.float64, copy=True) for name, tensor in case.group("weight.").items()}
    # A norm that the case switches off has no parameter here; the reference stores it, gives it no gradient, and decays it.
    idle = {name: nn.Parameter(initial[name].to(dtype, copy=True)) for name in switched_off(case.spec, initial)}
    config = OptimConfig(clip_norm=1.0)
    optimizer = build_optimizer([*model.named_parameters(), *idle.items()], config)
    losses = []
    for step, tokens in enumerate(case.tensors["tokens"].long()):
        optimizer.zero_grad()
        out = _forward(model, case, tokens, step=step)
        out.loss.backward()
        for p in [*model.parameters(), *idle.values()]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        clip_gradients(model.parameters(), config.clip_norm)
        set_lr(optimizer, dict.fromkeys(group_names(optimizer), outer_lr(step)))
        optimizer.step()
        losses.append(out.loss.detach())
    ours = state_to_reference(case.spec, model.decoder.state_dict(), shapes_of(case.group("weight.")))
    ours.update({name: p.detach() for name, p in idle.items()})
    final = case.group("final.")
    finals = [
        error(ours[name].double() - initial[name], stored.double() - initial[name]) for name, stored in final.items()
    ]
    return error(torch.stack(losses), case.tensors["losses"]), max(finals, key=_orderable)


def _gradients(model: TTTModel) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.decoder.named_parameters()}


def _orderable(value: float) -> float:
    return math.inf if math.isnan(value) else value
