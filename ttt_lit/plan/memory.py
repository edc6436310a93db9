"""Peak memory of a stage on one device, by part.

The peak of a micro-batch comes from a rehearsal of the real code (``rehearsal.py``). It grows by the same amount with every chunk, so a
few chunks are rehearsed and the rest is a straight line. What the ways to keep fast weights differ by is counted in copies, and so are
the carried keys of layers with sinks: whether a few chunks copy any is no matter of their number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from ttt_lit.model.spec import ModelSpec
from ttt_lit.ops.logit_tiles import tile_shape
from ttt_lit.plan.rehearsal import MicroBatch, Peaks, rehearse, with_fused_windows
from ttt_lit.train.optim import learns
from ttt_lit.train.stages import StagePlan
from ttt_lit.ttt.flops import chunks_kept, product_numbers
from ttt_lit.ttt.settings import EngineConfig, FastWeightStorage

# Parameters, gradients, moments and fast weights are float32 whatever the precision.
_MASTER = 4
# From the third chunk on, one more is like the one before it.
_REHEARSED = (3, 4)
_PLAIN = EngineConfig(fast_weights="every", residual_gib=0.0, compile=False)


PARTS = (
    *(
        "parameters",
        "gradients",
        "AdamW's moments",
        "teacher",
        "gathered parameters",
        "fast weights",
        "cotangents of fast weights",
    ),
    *("kept products", "logits, head's gradient", "activations", "AdamW's temporaries"),
)
"""In the order in which they are shown. Activations are the rest."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a stage runs."""

    devices: int
    on_cpu: bool
    half: bool

    @property
    def number_bytes(self) -> int:
        return 2 if self.half else 4


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one device at the stage's peak."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stage_memory(
    spec: ModelSpec, plan: StagePlan, engine: EngineConfig, setting: Setting, *, teacher: ModelSpec | None = None
) -> StageMemory:
    """``spec``: the network with the stage's window; ``teacher``: the stage's, if it has one."""
    mode, shapes = plan.config.mode, spec.parameter_shapes()
    parameters = _MASTER * spec.num_parameters() / setting.devices
    learnt = _MASTER * sum(math.prod(shape) for name, shape in shapes.items() if learns(name, mode))
    parts = {"parameters": parameters, "gradients": learnt / setting.devices, "AdamW's moments": 2 * parameters}
    if teacher is not None:
        parts["teacher"] = _teacher(teacher, setting)
    whole = _gathered(spec) if setting.devices > 1 else 0.0
    stored, live = _micro_batch(spec, plan, engine, setting, teacher)
    # Without shards the rehearsal makes the gradients; with shards it makes whole ones, beside those that a device keeps.
    rest = live if setting.devices > 1 else live - parts["gradients"]
    temporary = _adamw_temporaries(spec, learnt, setting)
    if temporary > whole + stored + rest:
        return StageMemory(parts=parts | {"AdamW's temporaries": temporary})
    parts |= {"gathered parameters": whole, "fast weights": stored}
    for name, size in (
        ("kept products", _kept_products(spec, plan, engine, setting)),
        ("logits, head's gradient", _logits(spec, plan, setting)),
        ("cotangents of fast weights", _cotangents(spec, plan)),
    ):
        parts[name] = min(rest, size)
        rest -= parts[name]
    return StageMemory(parts=parts | {"activations": rest})


def all_products(spec: ModelSpec, plan: StagePlan, setting: Setting) -> float:
    """Bytes of what engine.residual_gib may keep in this stage."""
    everything = dataclasses.replace(_PLAIN, residual_gib=math.inf)
    return _kept_products(spec, plan, everything, setting)


def _teacher(teacher: ModelSpec, setting: Setting) -> float:
    """Bytes of its weights in compute precision: a shard, and what is whole during a step."""
    own = setting.number_bytes * teacher.num_parameters() / setting.devices
    return own + (_gathered(teacher) * setting.number_bytes / _MASTER if setting.devices > 1 else 0.0)


def _micro_batch(
    spec: ModelSpec, plan: StagePlan, engine: EngineConfig, setting: Setting, teacher: ModelSpec | None
) -> tuple[float, float]:
    """At the peak of a micro-batch: bytes of fast weights, and everything else beside parameters and optimiser."""
    batch = MicroBatch(
        sequences=plan.sequences,
        context=plan.context,
        chunk=plan.chunk,
        mode=plan.config.mode,
        engine=dataclasses.replace(_PLAIN, recompute_blocks=engine.recompute_blocks),
        half=setting.half,
        on_cpu=setting.on_cpu,
        gradients_exist=plan.accumulate > 1,
        sharded=setting.devices > 1,
        teacher=teacher,
    )
    if not batch.updates:
        return 0.0, _rehearsed(spec, batch).peak
    chunks = plan.context // plan.chunk
    usual = _stored(spec, plan, "every", setting)
    stored = _stored(spec, plan, engine.fast_weights, setting)
    more = _kept_products(spec, plan, engine, setting) + _gathered_keys(spec, plan, setting)
    phases = zip(_line(_without_carried_sinks(spec), batch, chunks), usual, stored, Peaks(more, more, 0), strict=True)
    return max(((there, peak - here + more) for peak, here, there, more in phases), key=sum)


def _without_carried_sinks(spec: ModelSpec) -> ModelSpec:
    whole = spec.suffix_start + 1
    carried = (dataclasses.replace(layer, sink_tokens=0) for layer in spec.layers[whole:])
    return spec.with_layers((*spec.layers[:whole], *carried))


def _gathered_keys(spec: ModelSpec, plan: StagePlan, setting: Setting) -> float:
    """Bytes of the copies that one chunk reads where a gap lies between the carried sinks and the carried window."""
    copied = 0
    for layer in spec.layers[spec.suffix_start + 1 :]:
        reach = 0 if layer.window is None else layer.window - 1 + layer.sink_tokens
        if layer.sink_tokens and reach < plan.context - plan.chunk:
            copied += reach
    return 2.0 * spec.num_kv_heads * spec.head_dim * plan.sequences * setting.number_bytes * copied


def _line(spec: ModelSpec, batch: MicroBatch, chunks: int) -> Peaks:
    """Every phase's peak, from two short rehearsals where the stage has more chunks."""
    if chunks <= max(_REHEARSED):
        return _rehearsed(spec, batch)
    few, more = (_rehearsed(spec, dataclasses.replace(batch, context=count * batch.chunk)) for count in _REHEARSED)
    return Peaks(*(b + (b - a) * (chunks - _REHEARSED[1]) for a, b in zip(few, more, strict=True)))


def _rehearsed(spec: ModelSpec, batch: MicroBatch) -> Peaks:
    """A rehearsal, made once for everything that it cannot tell apart: it is the slow part of a plan."""
    existing = batch.gradients_exist and not batch.sharded
    return _rehearsed_once(with_fused_windows(spec, batch), dataclasses.replace(batch, gradients_exist=existing))


_rehearsed_once = functools.cache(rehearse)


def _updates(plan: StagePlan) -> bool:
    return plan.config.mode in ("meta", "first_order")


def _copy(spec: ModelSpec, plan: StagePlan) -> float:
    """Bytes of one chunk's fast weights over the sequences of a micro-batch."""
    widths = (_fast_width(spec, index) for index in spec.ttt_layers)
    return _MASTER * plan.sequences * sum(3 * width * spec.hidden_size for width in widths)


def _cotangents(spec: ModelSpec, plan: StagePlan) -> float:
    """Bytes of the adjoint's own copies of fast weights: of later chunks, of this one, and, where it is exact, the direction."""
    return {"meta": 3, "first_order": 2}.get(plan.config.mode, 0) * _copy(spec, plan)


def _fast_width(spec: ModelSpec, index: int) -> int:
    layer = spec.layers[index]
    if layer.fast == "mlp":
        return spec.intermediate_size
    assert layer.prime is not None
    return layer.prime.intermediate_size


def _stored(spec: ModelSpec, plan: StagePlan, storage: FastWeightStorage, setting: Setting) -> Peaks:
    """Bytes of fast weights on the device at the peak of each part of a micro-batch. The adjoint frees them as it goes."""
    chunks = plan.context // plan.chunk
    # W_0 is the parameters.
    most = chunks - 1
    forward, suffix = most, most
    steps = (0, 0)
    if storage == "two_level":
        stretch = math.isqrt(most) + 1
        kept = math.ceil(chunks / stretch) - 1
        forward, suffix = kept + 1, kept + stretch - 1
    elif storage == "factors":  # two steps are undone at the peak
        forward, suffix = 1, 2
        steps = (most, max(0, most - 2))
    elif storage == "offload" and not setting.on_cpu:
        forward, suffix = 1, 2
    copy, factors = _copy(spec, plan), _factors(spec, plan, setting)
    return Peaks(min(most, forward) * copy + steps[0] * factors, min(most, suffix) * copy + steps[1] * factors, 0)


def _factors(spec: ModelSpec, plan: StagePlan, setting: Setting) -> float:
    """Bytes of one step's factors, as products take and give them."""
    numbers = sum(3 * _fast_width(spec, index) + 2 * spec.hidden_size for index in spec.ttt_layers)
    return plan.sequences * plan.chunk * numbers * setting.number_bytes


def _kept_products(spec: ModelSpec, plan: StagePlan, engine: EngineConfig, setting: Setting) -> float:
    if not _updates(plan):
        return 0.0
    tokens = plan.sequences * plan.chunk
    kept = chunks_kept(
        spec,
        tokens=tokens,
        chunks=plan.context // plan.chunk,
        number_bytes=setting.number_bytes,
        budget_bytes=engine.residual_bytes,
    )
    return kept * tokens * product_numbers(spec) * setting.number_bytes


def _logits(spec: ModelSpec, plan: StagePlan, setting: Setting) -> float:
    """Bytes of what the head's backward holds at once: scores of a tile, and the gradient of the head being summed."""
    updates = _updates(plan)
    tokens = plan.sequences * (plan.chunk if updates else plan.context)
    rows, columns = tile_shape(spec.vocab_size, "cpu" if setting.on_cpu else "cuda")
    tile = min(tokens, rows) * columns
    scores = 3 if updates else 2  # with a tangent: probabilities, a cotangent, and a product on its way
    # In half precision the product is made beside the sum that it is added to.
    head = (spec.vocab_size + (columns if setting.half else 0)) * spec.hidden_size
    return _MASTER * (scores * tile + head) + (setting.number_bytes * tile if setting.half else 0)


def _adamw_temporaries(spec: ModelSpec, learnt: float, setting: Setting) -> float:
    """On a GPU the roots of all second moments at once, on a CPU those of one tensor."""
    if not setting.on_cpu:
        return learnt / setting.devices
    return 2.0 * _MASTER * max(math.prod(shape) for shape in spec.parameter_shapes().values())


def _gathered(spec: ModelSpec) -> float:
    """Whole parameters during a step: the root unit (suffix, final norm, embeddings, head), and two blocks below it."""
    sizes = {name: _MASTER * math.prod(shape) for name, shape in spec.parameter_shapes().items()}
    below = [0] * spec.suffix_start
    root = 0
    for name, size in sizes.items():
        parts = name.split(".")
        if parts[0] == "layers" and int(parts[1]) < spec.suffix_start:
            below[int(parts[1])] += size
        else:
            root += size
    return float(root + sum(sorted(below)[-2:]))
