"""A record like the demo's, whose losses are keyword arguments so that tests can bend them; and runs of a small matrix."""

from ttt_lit.record.measured import (
    Bucket,
    Ceiling,
    Damage,
    Document,
    EvaluationPoint,
    Imported,
    Norms,
    Throughput,
    Transition,
    Validation,
)
from ttt_lit.record.schema import Environment, Git, Model, Parent, Planned, RunRecord, Spent, Stage, Start

EDGES = (0, 8, 64, 128, 256, 512, 1024)
SWA = (4.6, 3.9, 3.7, 3.60, 3.58, 3.61)
TTT_ON = (4.5, 3.6, 3.3, 3.2, 3.0, 2.9)
WINDOW, LONG = 256, 1024


def validation(inner, losses, mean=None):
    buckets = [
        Bucket(start=start, stop=stop, nats_per_token=loss)
        for start, stop, loss in zip(EDGES[:-1], EDGES[1:], losses, strict=True)
    ]
    if mean is None:
        mean = sum(bucket.nats_per_token * (bucket.stop - bucket.start) for bucket in buckets) / LONG
    return Validation(
        inner=inner,
        context=LONG,
        nats_per_token=mean,
        bits_per_byte=mean / 2.1,
        blocks=4,
        tokens=4 * LONG,
        bytes=12_000,
        buckets=buckets,
        documents=[
            Document(id=f"{i:012x}", source=i, bytes=3_000, nats_per_token=mean, short=losses[3], deciles=[mean] * 10)
            for i in range(4)
        ],
        curve=f"curves/{inner}.npy",
    )


def spent(compute=100.0, validation_seconds=5.0):
    seconds = {"compute": compute, "validation": validation_seconds, "checkpoint": 1.0, "compile": 0.0}
    return Spent(optimizer_steps=60, micro_batches=120, tokens=245_760, bytes=737_280, gpu_seconds=seconds)


def demo(*, run_id="demo-1", swa=SWA, off=SWA, on=TTT_ON, after=3.5, windows=(WINDOW, WINDOW), validation_seconds=5.0):
    transition = Transition(kind="prime MLPs inserted", preserves=True, before=3.5, after=after, tolerance=1e-5)
    swa_stage = Stage(
        name="B1",
        mode="none",
        context=256,
        windows=list(windows),
        planned=Planned(optimizer_steps=60, tokens=245_760),
        spent=spent(validation_seconds=validation_seconds),
        train_loss_first=3.7,
        train_loss_mean=3.65,
        train_loss_last_tenth=3.6,
        validations=[validation("off", swa)],
        throughput=Throughput(
            tokens_per_second=2457.6, seconds_per_1k_tokens=0.40690, flop_per_token=2.1e7, flop_per_second=5.2e10
        ),
    )
    ttt_stage = Stage(
        name="C",
        mode="meta",
        context=LONG,
        windows=list(windows),
        planned=Planned(optimizer_steps=60, tokens=245_760),
        spent=spent(compute=200.0, validation_seconds=validation_seconds),
        carry="params",
        train_loss_first=3.5,
        train_loss_mean=3.2,
        train_loss_last_tenth=3.0,
        transition=transition,
        validations=[validation("off", off), validation("on", on)],
        inner_update_norms=Norms(mean=0.02, minimum=0.001, maximum=0.1, last=0.03, count=7680, by_chunk=[0.01, 0.03]),
        throughput=Throughput(
            tokens_per_second=1228.8,
            seconds_per_1k_tokens=0.8138,
            flop_per_token=4.0e7,
            flop_per_second=4.9e10,
            peak_memory_gib=1.5,
        ),
        damage=[
            Damage(when="start", context="long", inner="off", inside=0.02, beyond=0.75, nats=0.5),
            Damage(when="end", context="long", inner="off", inside=-0.01, beyond=0.06, nats=0.04),
            Damage(when="end", context="long", inner="on", inside=-0.02, beyond=0.01, nats=0.0),
            Damage(when="end", context="short", inner="off", inside=0.03, beyond=None, nats=0.03),
        ],
    )
    return RunRecord(
        run_id=run_id,
        experiment="q_p1_bridge",
        status="finished",
        config={"seed": 0, "stages": {"C": {"mode": "meta"}}},
        start=Start(source="checkpoints/demo", lineage=[{"step": "import"}], receipt={"inherited": 30}),
        model=Model(family="qwen2", num_parameters=3_350_000, num_layers=2, ttt_layers=[1]),
        environment=Environment(versions={"torch": "2.13.0"}, kernels=["math"]),
        git=Git(revision="0" * 40, dirty=False),
        imported=[
            Imported(
                context="short",
                blocks=4,
                tokens=1024,
                nats_per_token=3.6,
                buckets=[Bucket(start=0, stop=256, nats_per_token=3.6)],
            )
        ],
        stages=[swa_stage, ttt_stage],
        evaluations=[EvaluationPoint(stage="C", tokens=300_000, gpu_seconds=150.0, inner_on=3.1, inner_off=3.6)],
        totals=Spent(
            optimizer_steps=120, micro_batches=240, tokens=491_520, bytes=1_474_560, gpu_seconds={"compute": 300.0}
        ),
        parents=[Parent(name="pretrain/1", stage="A", gpu_seconds=150.0, tokens=1_146_880)],
        ceiling=[
            Ceiling(
                window=WINDOW,
                stride=64,
                nats=0.1,
                low=0.08,
                high=0.12,
                blocks=4,
                documents=4,
                checkpoint="demo (0123)",
                digest="0123",
            )
        ],
    )
