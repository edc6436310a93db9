"""A run whose windows have attention sinks and spare a layer, in every stage: measured with updates, and no jump where nothing changes."""

import pytest
import torch
from fitting import run

from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.record.schema import RunRecord

SIZE = ("--model.size.sink_tokens=2", "--model.size.full_attention_layers=[1]")
B1 = '--model.stages.B1={"enabled": true, "share": 0.3, "window_share": 0.25}'
B2 = '--model.stages.B2={"enabled": true, "share": null, "window_share": 0.25}'
NARROW = [(4, 2), (None, 0), (4, 2), (4, 2)]


def reaches(spec):
    return [(layer.window, layer.sink_tokens) for layer in spec.layers]


@pytest.fixture(scope="module")
def bridge(world, tmp_path_factory):
    """B1, then TTT in B2, both with window 4 and two sinks on contexts of 16."""
    extra = (*SIZE, B1, B2, "--model.stages.C=null", "--model.validation.every_share=0.5")
    parts = run(world, tmp_path_factory.mktemp("sinks"), *extra, '--model.validation.during=["B1"]', steps=10)
    return parts, RunRecord.read(parts.run.folder)


def test_every_stage_is_measured_with_updates_and_without(bridge):
    _, record = bridge
    assert [[v.inner for v in stage.validations] for stage in record.stages] == [["off", "on"], ["off", "on"]]
    assert all(None not in (point.inner_off, point.inner_on) for point in record.evaluations)
    assert record.stages[1].inner_update_norms.minimum > 0


def test_sinks_that_come_with_a_window_are_a_jump_and_sinks_that_stay_are_none(bridge):
    _, record = bridge
    narrowed, learning = (stage.transition for stage in record.stages)
    assert not narrowed.preserves
    assert narrowed.difference != 0
    assert learning.preserves
    assert abs(learning.difference) <= learning.tolerance
    assert [stage.sink_tokens for stage in record.stages] == [2, 2]
    assert "4 with 2 sinks" in learning.kind


def test_learned_sinks_are_proved_silent_and_then_learn_in_every_stage(world, tmp_path):
    dense = '--model.stages.B0={"enabled": true, "attention": "dense", "share": 0.3}'
    rest = ("--model.start.sink_logits=true", "--model.validation.every_share=0", "--model.stages.C=null")
    parts = run(world, tmp_path, *SIZE, *rest, dense, B1, B2, steps=10)
    record = RunRecord.read(parts.run.folder)
    first, _, learning = (stage.transition for stage in record.stages)
    assert first.preserves
    assert abs(first.difference) <= first.tolerance
    assert learning.preserves
    found = [load_checkpoint(parts.run.folder / "checkpoints" / stage).state() for stage in ("B0", "B1", "B2")]
    sinks = [torch.cat([t for name, t in state.items() if "sink_logit" in name]) for state in found]
    assert sinks[0].numel() == 4 * parts.module.start.spec.num_heads
    assert all((a != b).all() for a, b in zip(sinks, [torch.zeros_like(sinks[0]), *sinks], strict=False))


def test_a_checkpoint_has_its_sinks_and_a_run_from_it_those_that_it_asks_for(bridge, world, tmp_path):
    parts, _ = bridge
    path = parts.run.folder / "checkpoints" / "B2"
    assert reaches(load_checkpoint(path).spec) == NARROW
    without = B2.replace("0.25", '0.25, "sink_tokens": 0')
    extra = (*SIZE, f"--model.start.init_from={path}", "--model.stages.B1=null", without, "--model.stages.C=null")
    module = run(world, tmp_path, *extra, "--model.ttt=null", steps=2).module
    assert reaches(module.start.spec) == [(None, 0)] * 4
    assert reaches(module.model.decoder.spec) == [(4, 0), (None, 0), (4, 0), (4, 0)]
