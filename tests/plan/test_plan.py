"""The plan of a run: its memory is what a real step takes, its work is the count's, and its words help."""

import dataclasses
import functools
import math
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cli
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec
from ttt_lit.plan.advise import Stage, recommended
from ttt_lit.plan.config import read_run
from ttt_lit.plan.devices import DEVICES, device_named
from ttt_lit.plan.memory import _MASTER, Setting, stage_memory
from ttt_lit.plan.rehearsal import MicroBatch, rehearse
from ttt_lit.train.optim import OptimConfig, build_optimizer, clip_gradients
from ttt_lit.train.teacher import Teacher
from ttt_lit.ttt.flops import training_flops
from ttt_lit.ttt.scan import sequence_loss
from ttt_lit.ttt.settings import EngineConfig
from ttt_lit.verdict.formats import ranges

# What a plan is for: whether a run fits. Rehearsals are exact; extrapolated chunks and counted copies are not.
TOLERANCE = 0.10
DEMO = ["--config", "configs/q_p1_bridge.yaml", "--config", "configs/size/demo.yaml"]
SHAPE = "configs/demo/config.json"
# A quarter of the demo's sequences at a time: four micro-batches a step.
FEWER = "--model.size.micro_batch_tokens=1024"
CPU = Setting(devices=1, on_cpu=True, half=False)


@pytest.fixture(scope="module", autouse=True)
def in_the_repository(pytestconfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(pytestconfig.rootpath)
        yield


@functools.cache
def stage(name, *arguments):
    """A stage of the demo: its network and its plan."""
    run = read_run([*DEMO, *arguments], SHAPE)
    plan = next(plan for plan in run.plans(1) if plan.name == name)
    return plan.network(run.spec), plan


def allocated(step):
    """Bytes at the peak over ``step``, beside what exists before, from the allocator's own log."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        step()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measured(spec, plan, engine, *, half=False, teacher=None):
    """Bytes of the last micro-batch of a real optimiser step and of the step itself, at the peak."""
    decoder = Decoder(spec)
    decoder.initialise(generator=torch.Generator().manual_seed(0))
    optimizer = build_optimizer(decoder.named_parameters(), OptimConfig())
    tokens = torch.randint(spec.vocab_size, (plan.sequences, plan.context + 1))
    frozen = None if teacher is None else Teacher(Decoder(teacher)).requires_grad_(False)
    if frozen is not None and half:
        frozen.to(torch.bfloat16)

    def micro_batch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            arguments = {"mode": plan.config.mode, "chunk": plan.chunk, "inner_lr": 1.0, "clip": 1.0}
            arguments |= {} if frozen is None else {"teacher": frozen(tokens)}
            out = sequence_loss(decoder, tokens, engine=engine, **arguments)
        (out.loss if frozen is None else out.loss + out.token_kl.mean()).backward()

    def last_micro_batch_and_step():
        micro_batch()
        clip_gradients(decoder.parameters(), 1.0)
        optimizer.step()

    if plan.accumulate > 1:
        micro_batch()
    existing = [*decoder.parameters(), *(p.grad for p in decoder.parameters() if p.grad is not None)]
    existing += [] if frozen is None else list(frozen.parameters())
    existing += [value for state in optimizer.state.values() for value in state.values()]
    return sum(t.nbytes for t in existing) + allocated(last_micro_batch_and_step)


KEEP_ALL = EngineConfig(recompute_blocks=False, residual_gib=math.inf)


@pytest.mark.parametrize(
    "name, arguments, engine",
    [
        ("B1", (), KEEP_ALL),
        ("B1", (), EngineConfig()),
        pytest.param("B2", (), KEEP_ALL, marks=pytest.mark.slow),
        pytest.param("C", (FEWER,), KEEP_ALL, marks=pytest.mark.slow),
    ],
    ids=["B1", "B1 recomputed", "B2", "C"],
)
def test_the_demos_memory_is_that_of_a_real_step(name, arguments, engine):
    spec, plan = stage(name, *arguments)
    assert stage_memory(spec, plan, engine, CPU).total == pytest.approx(measured(spec, plan, engine), rel=TOLERANCE)


@pytest.mark.parametrize(
    "name, storage",
    [
        ("B2", "every"),
        ("B2", "offload"),
        ("C", "factors"),
        ("C", "two_level"),
    ],
)
def test_every_way_to_keep_fast_weights_takes_the_memory_of_a_real_step(name, storage):
    spec, plan = stage(name, FEWER)
    engine = EngineConfig(recompute_blocks=False, fast_weights=storage)
    assert plan.accumulate > 1
    assert stage_memory(spec, plan, engine, CPU).total == pytest.approx(measured(spec, plan, engine), rel=TOLERANCE)


@pytest.mark.slow
def test_carried_keys_of_layers_with_sinks_are_those_of_a_real_step():
    """Three of four layers of the suffix carry keys, windows below the context: their copies are most of what the sinks add."""
    spec, plan = stage("C", FEWER, "--model.ttt.layers=[2]", "--model.size.window=64", "--model.size.sink_tokens=32")
    without = spec.with_layers(tuple(dataclasses.replace(layer, sink_tokens=0) for layer in spec.layers))
    planned, real = ([f(s, plan, EngineConfig()) for s in (spec, without)] for f in (planned_total, measured))
    assert planned == pytest.approx(real, rel=TOLERANCE)
    assert planned[0] - planned[1] == pytest.approx(real[0] - real[1], rel=0.3)


def planned_total(spec, plan, engine):
    return stage_memory(spec, plan, engine, CPU).total


def test_half_precision_takes_the_memory_of_a_real_step():
    spec, plan = stage("B2", FEWER)
    predicted = stage_memory(spec, plan, EngineConfig(), dataclasses.replace(CPU, half=True)).total
    assert predicted == pytest.approx(measured(spec, plan, EngineConfig(), half=True), rel=TOLERANCE)


@pytest.mark.parametrize("half", [False, True])
def test_a_teacher_takes_the_memory_of_a_real_step(half):
    spec, plan = stage("B1", FEWER)
    bare = tuple(LayerSpec(rope_base=layer.rope_base) for layer in spec.layers)
    teacher, setting = spec.with_layers(bare), dataclasses.replace(CPU, half=half)
    predicted = stage_memory(spec, plan, EngineConfig(), setting, teacher=teacher)
    assert predicted.parts["teacher"] == (2 if half else 4) * teacher.num_parameters()
    assert predicted.total == pytest.approx(
        measured(spec, plan, EngineConfig(), half=half, teacher=teacher), rel=TOLERANCE
    )
    four = stage_memory(
        spec, plan, EngineConfig(), dataclasses.replace(setting, devices=4, on_cpu=False), teacher=teacher
    )
    own = setting.number_bytes * teacher.num_parameters()
    # A quarter of it, and whole: the embeddings and two blocks of six.
    assert 0.25 * own < four.parts["teacher"] < 1.25 * own


def test_memory_grows_by_the_same_amount_with_every_chunk():
    spec, _ = stage("C")
    batch = MicroBatch(
        sequences=1, context=32, chunk=32, mode="meta", engine=EngineConfig(), half=False, on_cpu=False,
        gradients_exist=True, sharded=False,
    )  # fmt: skip
    few, more, most = (max(rehearse(spec, dataclasses.replace(batch, context=32 * n))) for n in (3, 4, 6))
    assert most == pytest.approx(more + 2 * (more - few), rel=0.01)


def test_shards_keep_the_suffix_and_the_embeddings_whole():
    spec, plan = stage("B2", FEWER)
    one, four = (
        stage_memory(spec, plan, EngineConfig(), dataclasses.replace(CPU, devices=n, on_cpu=False)).parts
        for n in (1, 4)
    )
    for name in ("parameters", "gradients", "AdamW's moments"):
        assert four[name] == one[name] / 4
    decoder = Decoder(spec)
    whole = [
        decoder.embed_tokens,
        decoder.norm,
        *decoder.layers[2:],
    ]  # two of the four blocks below, one ahead of the other
    assert four["gathered parameters"] == _MASTER * sum(p.numel() for m in whole for p in m.parameters())
    assert "gathered parameters" not in {name for name, size in one.items() if size}


def test_the_recommended_setting_fits_and_a_tighter_limit_needs_more_work():
    stages = [Stage(*stage("C", FEWER))]
    engine, setting = EngineConfig(recompute_blocks=False), dataclasses.replace(CPU, on_cpu=False)
    roomy = recommended(stages, engine, setting, math.inf)
    assert roomy.engine.residual_gib == math.inf
    limit = max(one.memory(engine, setting) for one in stages) * 0.9
    tight = recommended(stages, engine, setting, limit)
    assert tight.peak <= limit
    assert tight.engine.fast_weights != "every"
    assert tight.operations > roomy.operations
    assert recommended(stages, engine, setting, 2**20) is None


def test_a_teacher_is_planned_in_work_and_memory(capsys):
    arguments = ["plan", *DEMO, FEWER, "--shape", SHAPE, "--device=h100", "--model.stages.B1.teacher_kl=1"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith("teacher ")]
    assert len(rows) == 2  # of work, of memory
    for row in rows:
        assert float(row[1]) > 0
        assert [float(value) for value in row[2:]] == [0, 0]


@pytest.fixture
def printed(capsys):
    def run(*arguments):
        assert cli.main(["plan", *DEMO, FEWER, "--shape", SHAPE, *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_a_plan_is_printed_without_weights_data_or_gpu(printed, tmp_path):
    text = printed("--device=h100", "--utilisation=0.5", f"--output={tmp_path}", "--data.long=nowhere")
    assert max(map(len, text.splitlines())) <= 100
    assert "q_p1_bridge/demo on 1 × h100" in text
    assert "50% of it, which is assumed" in text
    assert (tmp_path / "plan.md").read_text().startswith("# q_p1_bridge/demo on 1 × h100\n")
    spec, plan = stage("C", FEWER)
    work = training_flops(spec, context=1024, mode="meta", chunk=32, kept_chunks=32).total
    row = next(line.split() for line in text.splitlines() if line.startswith("C  "))
    assert row[1:8] == ["meta", "1,024", "256", "+", "4", f"{plan.budget.steps:,}", f"{plan.tokens:,}"]
    assert float(row[8].replace(",", "")) == pytest.approx(989e12 / work, rel=1e-4)
    assert float(row[9].replace(",", "")) == pytest.approx(0.5 * 989e12 / work, rel=1e-4)


def test_what_does_not_fit_is_said_with_a_setting_that_does(printed):
    text = printed("--device=h100", "--memory-gib=0.2")
    assert re.search(r"within 90% of 0.2 GiB +yes +NO +NO|within 90% of 0.2 GiB +NO +NO +NO", text)
    assert "This run does not fit with" in text
    assert "Least work that fits: --model.engine.recompute_blocks" in text


def test_a_budget_in_hours_is_planned_in_tokens_of_the_expected_rate(printed):
    text = printed("--device=h100", "--model.budget.tokens=null", "--model.budget.gpu_hours=2")
    row = next(line for line in text.splitlines() if line.startswith("all "))
    assert row.split()[-1] == "2.0"


def test_a_cpu_has_no_published_peak(printed):
    assert "give --peak-tflops" in printed()
    assert "give --peak-tflops" not in printed("--peak-tflops=0.05")


def test_a_plan_names_the_ttt_layers_that_it_means_and_none_between(printed):
    assert "TTT layers 0, 2, 4–5; shape from" in " ".join(printed("--model.ttt.layers=[0,2,4,5]").split())
    assert ranges([17, 5, 11]) == "5, 11, 17"
    assert ranges(range(21, 28)) == "21–27"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [f"--shape={SHAPE}", "--trainer.devices=auto"],
            "trainer.devices: got auto, which depends on the machine; say how many",
        ),
        (["--shape=nowhere.json"], "--shape: nowhere.json does not exist"),
        (
            ["--model.start.init_from=nowhere"],
            "name a Hugging Face config.json with --shape (configs/shapes/ has some)",
        ),
        (["--shape", SHAPE, "--device=h900"], "--device: got 'h900', expected one of h100"),
        (["--shape", SHAPE, "--utilisation=0"], "--utilisation: got 0.0"),
        (["--shape", SHAPE, "--devices=0"], "--devices: got 0"),
        (["--shape", SHAPE, "--memory-gib=-1"], "--memory-gib: got -1.0"),
        (["--shape", SHAPE, "--model.ttt=null"], "stage B2: mode meta needs TTT layers; set model.ttt"),
        (["--shape", SHAPE, "--devices=3"], "use a multiple of"),
        (["--shape", SHAPE, "--trainer.precision=16-mixed"], "trainer.precision: got 16-mixed"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert cli.main(["plan", *DEMO, *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_every_gpu_has_a_peak_and_a_memory():
    assert all(device.peak_tflops and device.memory_gib for device in DEVICES.values() if not device.is_cpu)
    assert device_named("h100", memory_gib=94).peak_tflops == 989
