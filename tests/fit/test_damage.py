"""Damage: at both ends of every stage, the loss above the imported model's on the same tokens, inside the window and beyond it."""

import dataclasses

import pytest
import tiny
import torch
from fitting import StoppedClock, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import damage_log, start_validation
from ttt_lit import metrics
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec
from ttt_lit.record.measured import Damage
from ttt_lit.record.schema import RunRecord
from ttt_lit.train.budget import Budget
from ttt_lit.train.damage import damage, damage_modes, describe, hiding_window, position_curves
from ttt_lit.train.run import assemble
from ttt_lit.train.stages import SizeConfig, StageConfig, Stages, plan_stages
from ttt_lit.ttt.scan import sequence_loss

ONLY_C = [f"--model.stages.{name}=null" for name in ("B1", "B2")]
SETTINGS = [("short", "off"), ("short", "on"), ("long", "off"), ("long", "on")]
# float32 sums in another order.
CLOSE = {"abs": 2e-6}


def found(stage):
    return {(each.when, each.context, each.inner): each for each in stage.damage}


def curve_of(path, parts, context, mode, spec=None, added=None):
    """Mean loss at each position of a checkpoint, read again from disk, with what a run adds to it, at the full inner rate."""
    checkpoint = load_checkpoint(path)
    decoder = Decoder(spec or checkpoint.spec)
    decoder.load_state_dict({name: tensor.float() for name, tensor in checkpoint.state().items()} | (added or {}))
    module = parts.module
    stream = parts.data.open(module.validation_request(module.validation.damage_blocks, context))
    tokens = torch.cat([batch["tokens"] for batch in stream])
    with torch.no_grad():
        out = sequence_loss(decoder, tokens, mode=mode, chunk=tiny.CHUNK, inner_lr=1.0, clip=1.0)
    return out.token_nll.double().mean(0)


def test_both_ends_of_every_stage_are_measured_in_every_setting(bridge):
    _, _, record = bridge
    for stage in record.stages:
        assert list(found(stage)) == [(when, *setting) for when in ("start", "end") for setting in SETTINGS]
        for each in stage.damage:
            assert (each.beyond is None) == (each.context == "short")  # the window is as wide as the short context
            parts = [each.inside] if each.beyond is None else [each.inside, each.beyond]
            assert each.nats == pytest.approx(sum(parts) / len(parts))


@pytest.mark.parametrize("stage, off", [("B1", "none"), ("B2", "static"), ("C", "static")])
def test_the_end_is_what_the_stages_checkpoint_says(bridge, world, stage, off):
    parts, _, record = bridge
    of_stage = found(next(each for each in record.stages if each.name == stage))
    for context, inner in SETTINGS:
        trained = curve_of(parts.run.folder / "checkpoints" / stage, parts, context, off if inner == "off" else "meta")
        imported = curve_of(world / "checkpoint", parts, context, "none")
        difference, each = trained - imported, of_stage["end", context, inner]
        assert each.nats == pytest.approx(difference.mean().item(), **CLOSE)
        assert each.inside == pytest.approx(difference[: tiny.SHORT].mean().item(), **CLOSE)
        assert difference.abs().max() > 1e-3
        if context == "long":
            assert each.beyond == pytest.approx(difference[tiny.SHORT :].mean().item(), **CLOSE)


@pytest.mark.parametrize("stage, before", [("B1", None), ("B2", "B1")])
def test_the_start_with_updates_is_read_in_the_stages_network_at_the_full_inner_rate(bridge, world, stage, before):
    """B1 has other windows than its weights' own, B2 a warm-up that begins with a tenth of the rate."""
    parts, shapes, record = bridge
    index = [each.name for each in record.stages].index(stage)
    spec, added = parts.module.stage_spec(parts.module.plans[index]), shapes.primes[stage]
    weights = world / "checkpoint" if before is None else parts.run.folder / "checkpoints" / before
    for context in ("short", "long"):
        read = curve_of(weights, parts, context, "meta", spec=spec, added=added)
        imported = curve_of(world / "checkpoint", parts, context, "none")
        on, off = (found(record.stages[index])["start", context, inner] for inner in ("on", "off"))
        assert on.nats == pytest.approx((read - imported).mean().item(), **CLOSE)
        assert abs(on.nats - off.nats) > 1e-4


def test_the_time_is_no_training(world, tmp_path, monkeypatch):
    clock = StoppedClock()
    for callback in (start_validation, damage_log):
        monkeypatch.setattr(callback, "position_curves", clock.tick(position_curves))
    parts = assemble(tiny.arguments(world, tmp_path, *ONLY_C, steps=2), command="fit")
    parts.trainer.callbacks.insert(0, clock)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    # Both contexts: the imported model, the stage's start, its end.
    assert parts.module.ledger.spent("C").gpu_seconds == {"compute": 0, "validation": 6, "checkpoint": 0, "compile": 0}


def test_a_window_alone_damages_what_lies_beyond_it_and_nothing_inside(bridge):
    _, _, record = bridge
    start = found(record.stages[0])
    assert start["start", "short", "off"].nats == pytest.approx(0, **CLOSE)
    assert start["start", "long", "off"].inside == pytest.approx(0, **CLOSE)
    assert abs(start["start", "long", "off"].beyond) > 1e-4


def test_a_stage_that_changes_no_function_starts_where_the_one_before_it_ended(bridge):
    _, _, record = bridge
    for before, after in zip(record.stages[:-1], record.stages[1:], strict=True):
        for context in ("short", "long"):
            ended, begins = found(before)["end", context, "off"], found(after)["start", context, "off"]
            assert begins.nats == pytest.approx(ended.nats, **CLOSE)


def test_the_record_has_the_imported_models_own_losses(bridge, world):
    parts, _, record = bridge
    for each, context in zip(record.imported, ("short", "long"), strict=True):
        curve = curve_of(world / "checkpoint", parts, context, "none")
        assert (each.context, each.blocks, each.tokens) == (context, 2, 2 * len(curve))
        assert each.nats_per_token == pytest.approx(curve.mean().item(), **CLOSE)
        assert each.buckets[-1].nats_per_token == pytest.approx(curve[each.buckets[-1].start :].mean().item(), **CLOSE)


def test_tensorboard_shows_both_ends_of_every_stage(bridge):
    parts, _, record = bridge
    events = EventAccumulator(str(parts.run.folder), size_guidance={"scalars": 0})
    events.Reload()
    values = [event.value for event in events.Scalars(metrics.damage("long", "off", "beyond"))]
    ends = [found(stage)[when, "long", "off"].beyond for stage in record.stages for when in ("start", "end")]
    assert values == pytest.approx(ends, rel=1e-5)
    assert metrics.damage("short", "off", "beyond") not in events.Tags()["scalars"]


def test_a_run_from_random_weights_has_none(world, tmp_path):
    stages = (
        '--model.stages.A={"enabled": true, "share": null}',
        *(f"--model.stages.{n}=null" for n in ("B1", "B2", "C")),
    )
    record = RunRecord.read(run(world, tmp_path, "--model.start.init=scratch", *stages, steps=2).run.folder)
    assert (record.imported, [stage.damage for stage in record.stages]) == ([], [[]])


def test_a_run_that_continues_another_has_no_imported_model_to_compare_with(bridge, world, tmp_path):
    parts, _, _ = bridge
    start = f"--model.start.init_from={parts.run.folder / 'checkpoints' / 'B2'}"
    stages = [f"--model.stages.{name}=null" for name in ("B1", "B2")]
    record = RunRecord.read(run(world, tmp_path, start, *stages, steps=2).run.folder)
    assert (record.imported, [stage.damage for stage in record.stages]) == ([], [[]])
    assert record.start_validation is not None


def test_without_short_documents_the_long_ones_alone_are_measured(world, tmp_path, capsys):
    stages = [f"--model.stages.{name}=null" for name in ("B1", "B2")]
    parts = run(world, tmp_path, *stages, "--data.short=null", steps=2)
    record = RunRecord.read(parts.run.folder)
    assert [each.context for each in record.imported] == ["long"]
    assert {each.context for each in record.stages[0].damage} == {"long"}
    line = next(line for line in capsys.readouterr().out.splitlines() if "above the imported model" in line)
    assert line.startswith("stage C: nats per token above the imported model, updates off: long +0.000 → ")


def test_it_can_be_left_out_and_blocks_that_are_not_there_are_refused_before_anything_starts(world, tmp_path):
    stages = [f"--model.stages.{name}=null" for name in ("B1", "B2")]
    record = RunRecord.read(run(world, tmp_path, *stages, "--model.validation.damage_blocks=0", steps=2).run.folder)
    assert (record.imported, record.stages[0].damage) == ([], [])
    with pytest.raises(ValueError, match="^model.validation.damage_blocks: .* asked for"):
        run(world, tmp_path / "more", "--model.validation.damage_blocks=100000")
    assert not (tmp_path / "more" / "tiny" / "default" / "record.json").exists()


def test_damage_is_a_difference_of_curves_cut_at_the_window():
    curve, imported = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64), [1.0, 1.0, 1.0, 1.0]
    assert damage(curve, imported, window=3) == {"inside": 1.0, "beyond": 5.0, "nats": 2.0}
    assert damage(curve, imported, window=None) == {"inside": 2.0, "beyond": None, "nats": 2.0}
    for no_number in (float("nan"), float("inf")):
        curve[3] = no_number
        assert damage(curve, imported, window=3) == {"inside": 1.0, "beyond": None, "nats": None}


# Sinks are for layers that had full attention: one of 14 tokens that is narrowed to 12 gets none.
@pytest.mark.parametrize(
    "layers, context, window",
    [([None, 8], 17, 12), ([None, 8], 16, None), ([None, 8], 12, None), ([None, 14], 16, 12), ([8, 8], 99, None)],
)
def test_a_window_that_spans_the_context_with_its_sinks_leaves_nothing_beyond(layers, context, window):
    size = SizeConfig(window=12, sink_tokens=4, short=16, long=32, chunk=4, tokens_per_step=32)
    (plan,) = plan_stages(Stages(B1=StageConfig()), size, Budget(tokens=64), devices=1)
    spec = tiny.tiny_spec(2).with_layers(tuple(LayerSpec(window=each) for each in layers))
    assert hiding_window(plan, spec, context=context) == window


def test_updates_are_measured_where_a_context_has_whole_chunks_and_more_than_one():
    modes = {"off": "static", "on": "meta"}
    assert damage_modes(modes, context=16, chunk=8) == modes
    for chunk in (16, 6, 32):
        assert damage_modes(modes, context=16, chunk=chunk) == {"off": "static"}


def test_the_console_line_has_a_settings_start_and_end_in_every_context():
    def entry(when, context, inner, nats, beyond=None):
        return Damage(when=when, context=context, inner=inner, inside=nats, beyond=beyond, nats=nats)

    entries = [
        entry("start", "short", "off", 0.5),
        entry("end", "short", "off", 0.1),
        entry("start", "long", "off", 0.2, 1.0),
        entry("end", "long", "off", -0.05, 0.25),
        entry("start", "long", "on", 7.0, 7.0),
        entry("end", "long", "on", 7.0, 7.0),
    ]
    broken = [dataclasses.replace(each, nats=None, beyond=None) if each.when == "end" else each for each in entries]
    without_number = "short +0.500 → not finite; long +0.200 → -0.050 inside the window, +1.000 → not finite beyond it"
    assert describe(broken, "off") == without_number
    said = "short +0.500 → +0.100; long +0.200 → -0.050 inside the window, +1.000 → +0.250 beyond it"
    assert describe(entries, "off") == said


TOO_SHORT = [*ONLY_C] + [f"--model.size.short={tiny.LONG}"]
"""Only long blocks are trained on, and the short documents do not fill the short context."""


@pytest.mark.parametrize("extra", ["--model.validation.damage_blocks=0", "--model.start.init=scratch"])
def test_short_documents_that_nothing_reads_may_be_too_short(world, tmp_path, extra):
    assert RunRecord.read(run(world, tmp_path, *TOO_SHORT, extra, steps=2).run.folder).status == "finished"


def test_short_documents_that_damage_alone_reads_must_fill_the_context(world, tmp_path):
    with pytest.raises(ValueError, match="^data.short: .* has documents of 16 tokens and more, expected at least 32"):
        run(world, tmp_path, *TOO_SHORT, steps=2)
