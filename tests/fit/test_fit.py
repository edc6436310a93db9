"""The framework's real fit: budgets, stages, modes, transitions, records; asserted from ledger and record, not from mocks."""

import numpy as np
import pytest
import tiny
import torch

from ttt_lit import metrics
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.train.start import resolve_start


def test_every_stage_spends_its_budget_to_the_token(bridge):
    parts, _, record = bridge
    planned = {"B1": 4, "B2": 6, "C": 10}
    assert {stage.name: stage.spent.optimizer_steps for stage in record.stages} == planned
    for stage in record.stages:
        assert stage.spent.tokens == stage.planned.tokens == planned[stage.name] * 128
        assert stage.spent.bytes > stage.spent.tokens  # a token of this text is more than a byte
    assert record.totals.tokens == 20 * 128 == parts.module.ledger.total().tokens
    assert record.status == "finished"


def test_stages_have_the_modes_and_contexts_they_ask_for(bridge):
    _, shapes, record = bridge
    seen = set(shapes.batches)
    # 64 tokens a micro-batch: four sequences of the short context, two of the long one, one token more for the targets.
    assert seen == {("B1", "none", (4, 17)), ("B2", "meta", (4, 17)), ("C", "meta", (2, 33))}
    order = [name for name, *_ in shapes.batches]
    assert order == ["B1"] * 8 + ["B2"] * 12 + ["C"] * 20
    assert [stage.windows for stage in record.stages] == [[16] * 4] * 3
    assert record.model.ttt_layers == [3]


def test_prime_mlps_and_their_optimiser_state_are_untouched_until_they_are_used(bridge):
    parts, shapes, _ = bridge
    start = resolve_start(parts.module.start_config, parts.module.ttt).state
    assert shapes.primes["B2"]
    for name, value in shapes.primes["B2"].items():
        assert torch.equal(value, start[name]), name
        assert all(not state.any() for state in shapes.moments["B2"][name].values()), name
    assert any(not torch.equal(shapes.primes["C"][name], start[name]) for name in shapes.primes["C"])


def test_transitions_are_proved_and_recorded(bridge):
    _, _, record = bridge
    for stage in record.stages:
        assert stage.transition.preserves
        assert stage.transition.held
        assert abs(stage.transition.difference) <= 1e-5
        assert np.isfinite(stage.transition.before)


def test_inner_updates_are_recorded_per_chunk(bridge):
    _, _, record = bridge
    b1, b2, c = record.stages
    assert b1.inner_update_norms is None
    # The last chunk's update is seen by nobody: 16 / 8 - 1 and 32 / 8 - 1 inner steps.
    assert len(b2.inner_update_norms.by_chunk) == 1
    assert len(c.inner_update_norms.by_chunk) == 3
    assert min(c.inner_update_norms.by_chunk) > 0


def test_validation_reports_both_settings_of_the_inner_loop(bridge):
    parts, _, record = bridge
    for stage in record.stages:
        assert [v.inner for v in stage.validations] == ["off", "on"]
        for validation in stage.validations:
            curve = np.load(parts.run.folder / validation.curve)
            assert curve.shape == (tiny.LONG,)
            assert curve.mean() == pytest.approx(validation.nats_per_token, abs=1e-12)
            assert validation.tokens == 4 * tiny.LONG
            bits = validation.nats_per_token * validation.tokens / np.log(2) / validation.bytes
            assert validation.bits_per_byte == pytest.approx(bits)
    assert record.stages[-1].validations[0].nats_per_token != record.stages[-1].validations[1].nats_per_token
    # Every quarter of stage C but its end, on the subset.
    assert [point.stage for point in record.evaluations] == ["C"] * 3
    assert [point.tokens for point in record.evaluations] == sorted(point.tokens for point in record.evaluations)


def test_time_is_booked_once(bridge):
    parts, _, record = bridge
    booked = sum(sum(stage.spent.gpu_seconds.values()) for stage in record.stages)
    # Nothing is booked twice: one device cannot have worked longer than the run took.
    assert 0 < booked <= parts.wall
    for stage in record.stages:
        assert stage.spent.gpu_seconds["compute"] > 0
        assert stage.spent.gpu_seconds["validation"] > 0
        assert stage.spent.gpu_seconds["checkpoint"] > 0
    totals = {name: sum(s.spent.gpu_seconds[name] for s in record.stages) for name in record.totals.gpu_seconds}
    assert record.totals.gpu_seconds == pytest.approx(totals)


def test_the_folder_holds_what_the_readme_promises(bridge):
    parts, _, _ = bridge
    folder = parts.run.folder
    for name in ("record.json", "position_loss.png", "curves/C_on.npy", "checkpoints/last.json"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("events.out.tfevents.*"))
    assert [path.name for path in (folder / "checkpoints").glob("resume-*")] == ["resume-20.ckpt"]


def test_tensorboard_has_the_tags_the_metric_names_promise(bridge):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts, _, record = bridge
    events = EventAccumulator(str(parts.run.folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {metrics.TRAIN_LOSS, metrics.GRAD_NORM, metrics.INNER_UPDATE_NORM, metrics.val_loss("on")}
    wanted |= {metrics.on_tokens_axis(metrics.TRAIN_LOSS), metrics.gpu_seconds("compute"), metrics.PEAK_MEMORY}
    assert wanted <= tags
    losses = [event.value for event in events.Scalars(metrics.TRAIN_LOSS)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(record.stages[0].train_loss_first)
    assert [event.step for event in events.Scalars(metrics.on_tokens_axis(metrics.TRAIN_LOSS))][-1] == 20 * 128


def test_the_hparams_page_knows_what_the_run_was_and_how_it_ended(bridge):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    parts, _, record = bridge
    events = EventAccumulator(str(parts.run.folder), size_guidance={"scalars": 0})
    events.Reload()
    (final,) = events.Scalars(metrics.FINAL_LOSS)
    assert final.value == pytest.approx(record.final().nats_per_token)
    (hours,) = events.Scalars(metrics.FINAL_GPU_HOURS)
    assert hours.value == pytest.approx(record.totals.gpu_seconds["compute"] / 3600, rel=1e-3)


def test_the_start_is_measured_as_it_came_on_the_blocks_of_every_stage_end(bridge):
    """B1 begins with the start's weights, and its window is as wide as the short context: the two agree there at the first step."""
    _, _, record = bridge
    start = record.start_validation
    assert start.inner == "off"
    for stage in record.stages:
        for validation in stage.validations:
            assert [d.id for d in validation.documents] == [d.id for d in start.documents]
    assert record.start_validation.nats_per_token != record.stages[0].validations[0].nats_per_token


def test_the_record_says_what_compares_it(bridge):
    parts, _, record = bridge
    assert record.headline == "on"
    assert record.model.family == "qwen2"
    assert record.data.long == parts.data.identity("long") != record.data.short
    assert record.start.weights_hash == parts.module.start.origin.weights_hash
    assert record.parents == []
    for stage in record.stages:
        assert len(stage.train_losses) == len(stage.train_gpu_seconds) == stage.spent.optimizer_steps
    seconds = [second for stage in record.stages for second in stage.train_gpu_seconds]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= record.totals.gpu_seconds["compute"] + 0.001
    for validation in record.stages[-1].validations:
        means = [document.nats_per_token for document in validation.documents]
        assert sum(means) / len(means) == pytest.approx(validation.nats_per_token, rel=1e-12)


def test_a_stage_checkpoint_is_the_model_and_its_history(bridge, world):
    parts, _, record = bridge
    checkpoint = load_checkpoint(parts.run.folder / "checkpoints" / "C")
    checkpoint.verify()
    assert checkpoint.generation_config == tiny.GENERATION
    assert checkpoint.spec == parts.module.stage_spec(parts.module.plans[-1])
    for name, parameter in parts.module.model.decoder.named_parameters():
        assert torch.equal(checkpoint.state()[name], parameter)
    made = dict(checkpoint.lineage[-1].parameters)
    assert 0 < made.pop("gpu_seconds") <= record.totals.gpu_seconds["compute"]
    assert made.pop("tokens") == record.totals.tokens
    assert made.pop("imported_windows") == [None] * 4
    assert made == {"experiment": "tiny", "run": "default", "stage": "C", "context": tiny.LONG}
    assert {r.name for r in checkpoint.receipt.records if "prime_init" in r.note} == set(parts.module.start.added)
