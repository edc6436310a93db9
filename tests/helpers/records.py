"""Records for comparisons: a run with held-out documents, at full size, whose every part a test can bend."""

from ttt_lit.record.measured import Bucket, Ceiling, Document, EvaluationPoint, Validation
from ttt_lit.record.schema import Data, Environment, Model, Planned, RunRecord, Spent, Stage, Start

CONTEXT = 32_768
STEP_TOKENS = 524_288
STEPS = 240
IMPORTED = "d" * 64
"""Hash of the imported model that every arm starts from, and that ceilings are of."""
FALLING = tuple(3.0 - 0.02 * tenth for tenth in range(10))


def validation(losses, *, context=CONTEXT, deciles=FALLING, short=None, inner="on"):
    """Of blocks with these losses (id → nats per token), each a document of its own.

    ``deciles``: of each, or id → deciles; ``short``: likewise, default its loss.
    """
    documents = [
        Document(
            id=each,
            source=number,
            bytes=4 * context,
            nats_per_token=loss,
            short=loss if short is None else short[each],
            deciles=list(deciles[each] if isinstance(deciles, dict) else deciles),
        )
        for number, (each, loss) in enumerate(sorted(losses.items()))
    ]
    mean = sum(losses.values()) / max(1, len(losses))
    return Validation(
        inner=inner,
        context=context,
        nats_per_token=mean,
        bits_per_byte=mean / 2.8,
        blocks=len(losses),
        tokens=len(losses) * context,
        bytes=4 * context * len(losses),
        buckets=[Bucket(start=0, stop=context, nats_per_token=mean)],
        documents=documents,
    )


def ceiling(low, *, nats=None, documents=40, window=8192, checkpoint="dense", digest=IMPORTED):
    """That context beyond the window is worth ``low`` nats per token at least; None: no interval."""
    centre = nats if nats is not None else (low or 0.0) + 0.005
    high = None if low is None else centre + 0.005
    return Ceiling(
        window=window, stride=1024, nats=centre, low=low, high=high, blocks=documents, documents=documents,
        checkpoint=checkpoint, digest=digest,
    )  # fmt: skip


def stage(name="C", *, losses=None, validations=(), steps=STEPS, mode="meta"):
    return Stage(
        name=name,
        mode=mode,
        context=CONTEXT,
        windows=[8192],
        planned=Planned(optimizer_steps=steps),
        spent=Spent(optimizer_steps=steps, tokens=steps * STEP_TOKENS, gpu_seconds={"compute": 1.0}),
        train_losses=list(losses if losses is not None else [3.0] * steps),
        validations=list(validations),
    )


def run(experiment, role, losses, *, seed=0, hours=100.0, final=None, train_losses=None, steps=STEPS, **fields):
    """A finished run. ``losses``: document id → nats per token; ``final``: the validation itself; ``fields``: of the record."""
    final = validation(losses) if final is None else final
    whole = {
        "run_id": f"s{seed}",
        "experiment": experiment,
        "role": role,
        "seed": seed,
        "headline": "on",
        "status": "finished",
        "model": Model(family="qwen2", num_parameters=1, num_layers=1, ttt_layers=[0]),
        "data": Data(tokenizer="t", short="s", long="l"),
        "environment": Environment(device="H200"),
        "start": Start()
        if role in ("ttt_scratch", "fa_scratch")
        else Start(source="checkpoint", weights_hash=IMPORTED),
        "stages": [stage(losses=train_losses, validations=[final], steps=steps)],
        "totals": Spent(
            optimizer_steps=steps,
            tokens=steps * STEP_TOKENS,
            bytes=4 * steps * STEP_TOKENS,
            gpu_seconds={"compute": hours * 3600, "validation": 1e6},
        ),
        "unigram_entropy": 7.0,
    }
    return RunRecord(**whole | fields)


def point(gpu_hours, loss, **fields):
    return EvaluationPoint(stage="C", tokens=1, gpu_seconds=gpu_hours * 3600, **({"inner_on": loss} | fields))
