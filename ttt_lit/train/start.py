"""The tensors that a run starts with: inherited or random, with the prime MLPs that its TTT stages need."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ttt_lit.checkpoint.receipt import Receipt
from ttt_lit.convert.fast_mlp import TTTConfig, new_tensors, prime_state, ttt_layers, with_prime
from ttt_lit.convert.windowed import with_sink_logits, with_windows
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import SINK_LOGIT, ModelSpec
from ttt_lit.train.origin import Origin, origin_of_checkpoint, origin_of_config


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The weights that a run begins with."""

    init_from: str
    """Folder of a checkpoint of ours (``python cli.py import`` makes one). With ``init: scratch`` only its shape and tokenizer are used,
    and a Hugging Face config.json does as well."""
    init: Literal["checkpoint", "scratch"] = "checkpoint"
    """``checkpoint``: its weights. ``scratch``: random weights of the same shape."""
    load: Literal["params", "all"] = "params"
    """``params``: weights only. ``all``: the optimiser's moments too; refused unless every shape matches, and unless the first stage has
    ``carry: all``."""
    tokenizer: str | None = None
    """Folder of the tokenizer, where ``init_from`` is a config.json; refused elsewhere."""
    sink_logits: bool = False
    """Give every layer that the imported model lets see everything a learned sink for each query head (docs/method.md); zero, without
    effect, at first. A checkpoint that has them already keeps them. Such a model cannot be exported. Not for heads with scores far below
    zero, as Qwen2.5-0.5B has: their first gradient is not finite, and the run stops (docs/log.md)."""
    std: float = 0.02
    """Standard deviation of random matrices."""
    seed: int = 0
    """Seed of every random initial value."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A resolved start: the full description and every tensor, prime MLPs included."""

    origin: Origin
    stored: ModelSpec
    """The origin's description with the prime MLPs and learned sinks that this run adds; windows as in the checkpoint."""
    spec: ModelSpec
    """The same with the windows that the imported model had: stages narrow these."""
    state: Mapping[str, Tensor]
    """Every parameter, float32 on CPU; a checkpoint's are read from disk one by one, as they are asked for."""
    added: dict[str, tuple[int, ...]]
    """Tensors that this run adds."""
    receipt: Receipt
    """What became of every tensor, for weights stored in float32."""
    optimizer: Mapping[str, Tensor] | None
    """``NAME.exp_avg``, ``NAME.exp_avg_sq`` and ``NAME.step``, with ``load: all``."""


def optimizer_file(checkpoint: str | Path) -> Path:
    """Where the optimiser's state lies: beside the checkpoint folder, which holds the model alone."""
    path = Path(checkpoint)
    return path.with_name(path.name + ".optimizer.safetensors")


def resolve_start(config: StartConfig, ttt: TTTConfig | None) -> Start:
    """Read, convert and initialise. Errors name what is missing and the command that makes it."""
    origin = _origin(config)
    stored = extended(origin, config, ttt)
    added = new_tensors(origin.spec, stored)
    if config.load == "all" and added:
        raise ValueError(
            f"model.start: load all needs a checkpoint with every tensor of this run, but {len(added)} are new "
            f"({next(iter(added))} …); set load: params"
        )
    checkpoint = origin.checkpoint
    state = _random_state(origin.spec, config) if checkpoint is None else _AsFloat32(checkpoint.state())
    if added:
        state = ChainMap(_new_state(origin, config, ttt, state, added), state)  # type: ignore[arg-type]
    return Start(
        origin=origin,
        stored=stored,
        spec=with_windows(stored, origin.imported_windows),
        state=state,
        added=added,
        receipt=_receipt(config, origin, added, ttt),
        optimizer=_optimizer_state(config, state) if config.load == "all" else None,
    )


def extended(origin: Origin, config: StartConfig, ttt: TTTConfig | None) -> ModelSpec:
    """The origin's network with everything that the run adds; windows as they are."""
    spec = _with_prime(origin, ttt)
    full = [index for index, window in enumerate(origin.imported_windows) if window is None]
    return with_sink_logits(spec, full) if config.sink_logits else spec


def _new_state(
    origin: Origin,
    config: StartConfig,
    ttt: TTTConfig | None,
    state: Mapping[str, Tensor],
    added: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The added tensors: learned sinks are zero, prime MLPs as their policy says."""
    new = {name: torch.zeros(shape) for name, shape in added.items() if name.endswith(SINK_LOGIT)}
    if ttt is not None:
        prime = _with_prime(origin, ttt)
        new |= prime_state(origin.spec, prime, state, init=ttt.prime_init, seed=config.seed, std=config.std)
    return new


def _with_prime(origin: Origin, ttt: TTTConfig | None) -> ModelSpec:
    """The origin's network with the TTT layers that the run asks for; those that it has already must be the same."""
    if ttt is None or not origin.spec.ttt_layers:
        return origin.spec if ttt is None else with_prime(origin.spec, ttt)
    bare = origin.shape_only().spec
    wanted = ttt_layers(bare, ttt.layers)
    width = ttt.prime_width or bare.intermediate_size
    primes = {layer.prime.intermediate_size for layer in origin.spec.layers if layer.prime is not None}
    if wanted != origin.spec.ttt_layers or primes - {width}:
        raise ValueError(
            f"model.ttt: the checkpoint has TTT layers {list(origin.spec.ttt_layers)} of width {sorted(primes)}, got layers "
            f"{list(wanted)} of width {width}; ask for the same, or set model.ttt: null to take them as they are"
        )
    return origin.spec


def _origin(config: StartConfig) -> Origin:
    from_config = config.init_from.endswith(".json")
    if config.init == "scratch" and config.load == "all":
        raise ValueError("model.start: init scratch has no optimiser state to load; set load: params")
    if from_config and config.init != "scratch":
        raise ValueError(
            f"model.start.init_from: {config.init_from} has no weights; set init: scratch or name a checkpoint folder"
        )
    if config.tokenizer is not None and not from_config:
        raise ValueError("model.start.tokenizer has no effect: the checkpoint folder brings its tokenizer; remove it")
    if from_config:
        return origin_of_config(config.init_from, config.tokenizer)
    origin = origin_of_checkpoint(config.init_from)
    return origin.shape_only() if config.init == "scratch" else origin


def _receipt(config: StartConfig, origin: Origin, added: dict[str, tuple[int, ...]], ttt: TTTConfig | None) -> Receipt:
    if origin.receipt is None:
        shapes = origin.spec.parameter_shapes()
        receipt = Receipt.all_new(
            shapes, dtype="F32", note=f"normal std {config.std:g}, norms identity, seed {config.seed}"
        )
    else:
        receipt = origin.receipt.stored_as(dict.fromkeys(origin.spec.parameter_shapes(), "F32"))
    sinks = {name: shape for name, shape in added.items() if name.endswith(SINK_LOGIT)}
    if prime := {name: shape for name, shape in added.items() if name not in sinks}:
        assert ttt is not None
        receipt = receipt.with_new(prime, dtype="F32", note=f"prime_init {ttt.prime_init}, seed {config.seed}")
    return receipt.with_new(sinks, dtype="F32", note="a learned sink of zero mass")


class _AsFloat32(Mapping[str, Tensor]):
    """Memory-mapped tensors, converted on access: eight ranks of a node share one copy in the page cache."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _random_state(spec: ModelSpec, config: StartConfig) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        decoder = Decoder(spec)
    decoder = decoder.to_empty(device="cpu")
    decoder.initialise(config.std, torch.Generator().manual_seed(config.seed))
    return dict(decoder.state_dict())


def _optimizer_state(config: StartConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = optimizer_file(config.init_from)
    if not path.is_file():
        raise FileNotFoundError(
            f"model.start: load all needs {path}, which is missing; a run writes it at each stage end, or set load: params"
        )
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged optimiser file ({error}); set load: params, or run the stage again"
        ) from error
    expected = {f"{name}.{part}": tensor.shape for name, tensor in state.items() for part in ("exp_avg", "exp_avg_sq")}
    expected |= {f"{name}.step": torch.Size([]) for name in state}
    wrong = sorted(n for n in expected.keys() | saved.keys() if n not in saved or saved[n].shape != expected.get(n))
    if wrong:
        raise ValueError(
            f"model.start: load all refused, {path} does not match the model in {len(wrong)} tensors: {', '.join(wrong[:3])} …"
        )
    return saved
