"""A run whose sliding-window stage has attention sinks and a kept layer: measured without updates, left with a jump, continued dense."""

import pytest
from fitting import run

from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.experiment.record import RunRecord

B1 = '--model.stages.B1={"enabled": true, "share": 0.3, "window_share": 0.25, "sink_tokens": 2, "full_attention_layers": [1]}'
B2 = '--model.stages.B2={"enabled": true, "share": null, "window_share": 0.25}'


@pytest.fixture(scope="module")
def ablation(world, tmp_path_factory):
    """B1 with window 4 and two sinks on contexts of 16, then B2 without sinks."""
    extra = (B1, B2, "--model.stages.C=null", "--model.validation.every_share=0.5", '--model.validation.during=["B1"]')
    parts = run(world, tmp_path_factory.mktemp("sinks"), *extra, steps=10)
    return parts, RunRecord.read(parts.run.folder)


def test_a_stage_with_sinks_is_measured_without_updates_alone(ablation):
    _, record = ablation
    assert [[v.inner for v in stage.validations] for stage in record.stages] == [["off"], ["off", "on"]]
    assert {(point.stage, point.inner_on) for point in record.evaluations} == {("B1", None)}
    assert all(point.inner_off is not None for point in record.evaluations)


def test_sinks_that_come_and_go_are_jumps_in_the_record(ablation):
    _, record = ablation
    for stage in record.stages:
        assert not stage.transition.preserves
        assert stage.transition.held
        assert stage.transition.difference != 0
    assert {"sinks", "tiled"} <= set(record.environment.kernels)


def test_a_checkpoint_of_the_stage_has_its_sinks_and_a_run_from_it_has_none(ablation, world, tmp_path):
    parts, _ = ablation
    path = parts.run.folder / "checkpoints" / "B1"
    layers = load_checkpoint(path).spec.layers
    assert [(layer.window, layer.sink_tokens) for layer in layers] == [(4, 2), (None, 0), (4, 2), (4, 2)]
    extra = (f"--model.start.init_from={path}", "--model.stages.B1=null", B2, "--model.stages.C=null")
    module = run(world, tmp_path, *extra, "--model.ttt=null", steps=2).module
    assert {(layer.window, layer.sink_tokens) for layer in module.start.spec.layers} == {(None, 0)}
    assert {(layer.window, layer.sink_tokens) for layer in module.model.decoder.spec.layers} == {(4, 0)}
