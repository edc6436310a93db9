"""From which, how much and how big to plain numbers; whatever does not fit is an error that names the stage."""

import dataclasses
import re
from types import SimpleNamespace
from typing import get_args

import pytest
from helpers.tiny import tiny_spec, ttt_layer
from hypothesis import assume, given
from hypothesis import strategies as st

from ttt_lit.convert.windowed import preserves_function, windowed
from ttt_lit.model.spec import LayerSpec
from ttt_lit.train.budget import Budget
from ttt_lit.train.checks import check_stages
from ttt_lit.train.evaluation import evaluation_modes
from ttt_lit.train.optim import Group
from ttt_lit.train.schedule import InnerLRSchedule, LRSchedule
from ttt_lit.train.stages import SizeConfig, StageConfig, Stages, plan_stages
from ttt_lit.train.start import StartConfig
from ttt_lit.ttt.inner import InnerLoop

DEMO = SizeConfig(short=256, long=1024, chunk=32, window=256, tokens_per_step=4096, micro_batch_tokens=4096)
FULL = SizeConfig()
B1 = StageConfig(share=0.05)
B2 = StageConfig(mode="meta", share=0.1)
C = StageConfig(mode="meta", context="long")
BRIDGE = Stages(B1=B1, B2=B2, C=C)


def numbers(stages, size, tokens, devices=1):
    plans = plan_stages(stages, size, Budget(tokens=tokens), devices=devices)
    return {p.name: (p.context, p.window, p.chunk, p.budget.steps, p.sequences, p.accumulate) for p in plans}


def test_the_demo():
    assert numbers(BRIDGE, DEMO, 491_520) == {
        "B1": (256, 256, 32, 6, 16, 1),
        "B2": (256, 256, 32, 12, 16, 1),
        "C": (1024, 256, 32, 102, 4, 1),
    }


@pytest.mark.parametrize("devices, short, long", [(1, (4, 16), (1, 16)), (8, (4, 2), (1, 2)), (16, (4, 1), (1, 1))])
def test_the_full_schedule_on_any_number_of_devices(devices, short, long):
    assert numbers(BRIDGE, FULL, 27_525_120_000, devices) == {
        "B1": (8192, 8192, 1024, 2625, *short),
        "B2": (8192, 8192, 1024, 5250, *short),
        "C": (32768, 8192, 1024, 44625, *long),
    }


def test_a_plan_knows_its_micro_batches_and_tokens():
    plans = plan_stages(BRIDGE, FULL, Budget(tokens=27_525_120_000), devices=8)
    assert [p.micro_batches for p in plans] == [2625 * 2, 5250 * 2, 44625 * 2]
    assert sum(p.tokens for p in plans) == 27_525_120_000


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.integers(10, 400),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 3, 8, 16]),
)
def test_shares_become_whole_steps_that_spend_the_budget_exactly(weights, steps, devices, micro):
    names = ["A", "B0", "B1", "B2", "C"][: len(weights)]
    shares = [w / sum(weights) for w in weights[:-1]] + [None]
    stages = Stages(**{n: StageConfig(share=s) for n, s in zip(names, shares, strict=True)})
    size = dataclasses.replace(DEMO, micro_batch_tokens=256 * micro)
    assume(min(weights) / sum(weights) * steps >= 1)
    plans = plan_stages(stages, size, Budget(tokens=4096 * steps), devices=devices)
    assert sum(p.budget.steps for p in plans) == steps
    for plan, weight in zip(plans, weights, strict=True):
        assert abs(plan.budget.steps - weight / sum(weights) * steps) < 1
        # One optimiser step is the same number of tokens for every plan: no partial accumulation.
        assert plan.sequences * plan.accumulate * devices * plan.context == plan.tokens_per_step == 4096
        assert plan.sequences <= max(1, micro)


def test_gpu_hours_are_split_into_device_seconds():
    plans = plan_stages(BRIDGE, FULL, Budget(gpu_hours=100), devices=8)
    assert [p.budget.seconds for p in plans] == [18_000, 36_000, 306_000]
    assert all(p.budget.steps is p.micro_batches is p.tokens is None for p in plans)


def test_stages_come_in_their_order_and_only_where_enabled():
    off = dataclasses.replace(B1, enabled=False)
    stages = Stages(C=C, A=StageConfig(share=0.5), B1=off, B2=None)
    assert list(stages.enabled()) == ["A", "C"]
    assert [p.name for p in plan_stages(stages, DEMO, Budget(tokens=40_960), devices=1)] == ["A", "C"]


@pytest.mark.parametrize("stages", [Stages(), Stages(B1=dataclasses.replace(B1, enabled=False))])
def test_a_run_without_stages_is_refused(stages):
    with pytest.raises(ValueError, match="no stage is enabled; set enabled: true"):
        plan_stages(stages, DEMO, Budget(tokens=4096), devices=1)


@pytest.mark.parametrize("share, window", [(1.0, 256), (0.5, 128), (0.25, 64), (0.001, 1)])
def test_the_window_is_a_share_of_the_sizes(share, window):
    plan = plan_stages(Stages(B1=StageConfig(window_share=share)), DEMO, Budget(tokens=4096), devices=1)[0]
    assert plan.window == window


def test_a_stage_reads_the_same_blocks_whatever_stands_before_it():
    """The order of the data is keyed by the stage's name, not by its place in the run."""
    alone = plan_stages(Stages(C=C), DEMO, Budget(tokens=40960), devices=1)
    after = plan_stages(Stages(B1=dataclasses.replace(B1, share=0.2), C=C), DEMO, Budget(tokens=40960), devices=1)
    assert alone[0].order == after[1].order != after[0].order


def test_dense_attention_has_no_limit():
    plan = plan_stages(Stages(B0=StageConfig(attention="dense")), DEMO, Budget(tokens=4096), devices=1)[0]
    assert plan.window is None


def only(stage, size=DEMO):
    """The plan of a run with one stage."""
    return plan_stages(Stages(B1=stage), size, Budget(tokens=8192), devices=1)[0]


IMPORTED = tiny_spec(LayerSpec(), LayerSpec(window=100), LayerSpec(), ttt_layer())


def test_a_stage_makes_its_network_from_the_imported_one():
    assert only(StageConfig()).network(IMPORTED) == windowed(IMPORTED, 256)
    assert only(StageConfig(attention="dense")).network(IMPORTED) == IMPORTED
    ablated = only(StageConfig(window_share=0.5, sink_tokens=4, full_attention_layers=[2])).network(IMPORTED)
    assert reaches(ablated) == [(128, 4), (100, 0), (None, 0), (128, 4)]
    assert ablated == windowed(IMPORTED, 128, sink_tokens=4, keep=(2,))


def reaches(spec):
    return [(layer.window, layer.sink_tokens) for layer in spec.layers]


@pytest.mark.parametrize("mode", ["none", "static", "meta", "first_order"])
def test_sinks_and_kept_layers_of_the_size_are_those_of_every_stage_that_says_nothing_else(mode):
    size = dataclasses.replace(DEMO, window=128, sink_tokens=4, full_attention_layers=[0])
    assert reaches(only(StageConfig(mode=mode), size).network(IMPORTED)) == [(None, 0), (100, 0), (128, 4), (128, 4)]
    other = StageConfig(mode=mode, sink_tokens=0, full_attention_layers=[])
    assert reaches(only(other, size).network(IMPORTED)) == [(128, 0), (100, 0), (128, 0), (128, 0)]
    dense = only(StageConfig(mode=mode, attention="dense"), size)
    assert (dense.sink_tokens, dense.full_attention_layers) == (0, ())
    assert dense.network(IMPORTED) == IMPORTED


def test_a_window_that_spans_the_context_may_have_sinks_and_kept_layers():
    """It is the same function there; longer contexts are validated with it."""
    plan = only(StageConfig(sink_tokens=4, full_attention_layers=[0]))
    assert (plan.window, plan.context) == (256, 256)
    assert preserves_function(IMPORTED, plan.network(IMPORTED).with_fast_layers_of(IMPORTED), 100)
    assert reaches(plan.network(IMPORTED)) == [(None, 0), (100, 0), (256, 4), (256, 4)]


@pytest.mark.parametrize("mode", ["none", "static", "meta", "first_order"])
def test_layers_keep_their_attention_in_every_mode(mode):
    plan = only(StageConfig(mode=mode, window_share=0.5, full_attention_layers=[3]))
    assert [layer.window for layer in plan.network(IMPORTED).layers] == [128, 100, 128, None]


def test_a_stage_of_one_step_with_warm_up_is_refused():
    """Its only step would have rate 0."""
    rest = (SimpleNamespace(spec=IMPORTED), StartConfig(init_from="."), InnerLoop(), DEMO)
    (short,) = plan_stages(Stages(B1=StageConfig()), DEMO, Budget(tokens=4096), devices=1)
    with pytest.raises(ValueError, match="stage B1: gets a single optimiser step, whose learning rate is 0"):
        check_stages([short], *rest)
    without = StageConfig(schedule=LRSchedule(warmup_share=0.0))
    check_stages(plan_stages(Stages(B1=without), DEMO, Budget(tokens=4096), devices=1), *rest)


def test_a_stage_may_update_some_of_the_ttt_layers():
    """The rest keep their prime MLPs and parameters; only what learns while reading changes."""
    imported = tiny_spec(ttt_layer(), LayerSpec(), ttt_layer(), ttt_layer())
    some = only(StageConfig(mode="meta", updated_layers=[2])).network(imported)
    everything = only(StageConfig(mode="meta")).network(imported)
    assert (some.ttt_layers, everything.ttt_layers) == ((2,), (0, 2, 3))
    assert some.parameter_shapes() == everything.parameter_shapes()
    assert some.with_fast_layers_of(imported) == everything


@pytest.mark.parametrize("layers", [[], [1], [0, 5]])
def test_layers_to_update_must_be_ttt_layers(layers):
    start = SimpleNamespace(spec=tiny_spec(ttt_layer(), LayerSpec()))
    plan = only(StageConfig(mode="meta", updated_layers=layers))
    with pytest.raises(ValueError, match=r"updated_layers: got .*, expected some of the run's TTT layers \[0\]"):
        check_stages([plan], start, StartConfig(init_from="."), InnerLoop(), DEMO)


@pytest.mark.parametrize("mode", ["none", "static"])
def test_layers_to_update_mean_nothing_without_updates(mode):
    with pytest.raises(ValueError, match=f"updated_layers .* has no effect with mode {mode}"):
        StageConfig(mode=mode, updated_layers=[0])


@pytest.mark.parametrize("mode", ["none", "static"])
def test_an_inner_schedule_means_nothing_without_updates(mode):
    schedule = InnerLRSchedule(warmup_share=0.1, initial_ratio=0.1)
    assert StageConfig(mode=mode).inner_schedule == InnerLRSchedule()
    assert StageConfig(mode="first_order", inner_schedule=schedule).inner_schedule == schedule
    with pytest.raises(
        ValueError, match=f"inner_schedule .*0.1.* has no effect with mode {mode}; set inner_schedule: "
    ):
        StageConfig(mode=mode, inner_schedule=schedule)


IMPORT, SCRATCH = StartConfig(init_from="."), StartConfig(init_from=".", init="scratch")


def test_what_is_new_may_have_a_rate_of_its_own():
    config = StageConfig(mode="static", lr=1e-5, new_lr=1e-3)
    assert {group: config.peak_lr(group) for group in get_args(Group)} == {"base": 1e-5, "prime": 1e-3, "sink": 1e-3}
    assert {StageConfig(lr=1e-5).peak_lr(group) for group in get_args(Group)} == {1e-5}
    with pytest.raises(KeyError):
        config.peak_lr("bias")
    check_stages([only(config)], SimpleNamespace(spec=tiny_spec(ttt_layer())), IMPORT, InnerLoop(), DEMO)


@pytest.mark.parametrize(
    "mode, spec, start, why",
    [
        ("static", tiny_spec(ttt_layer()), SCRATCH, "in a run from random weights, where everything is new"),
        ("none", tiny_spec(ttt_layer()), IMPORT, "with mode none the stage trains nothing that is not the imported"),
        ("none", tiny_spec(LayerSpec()), IMPORT, "with mode none the stage trains nothing that is not the imported"),
    ],
)
def test_a_rate_of_what_is_new_is_refused_where_nothing_is(mode, spec, start, why):
    plan = only(StageConfig(mode=mode, new_lr=1e-3))
    with pytest.raises(ValueError, match=f"^stage B1: new_lr 0.001 has no effect:? {why}"):
        check_stages([plan], SimpleNamespace(spec=spec), start, InnerLoop(), DEMO)


@pytest.mark.parametrize("layers, unknown", [([4], [4]), ([-1, 0], [-1]), ([3, 9, 7], [7, 9])])
def test_a_layer_to_keep_must_exist(layers, unknown):
    start = SimpleNamespace(spec=IMPORTED)
    rest = (StartConfig(init_from="."), InnerLoop(), DEMO)
    check_stages([only(StageConfig(window_share=0.5, full_attention_layers=[0, 3]))], start, *rest)
    message = rf"^stage B1: full_attention_layers: got {re.escape(str(unknown))}, expected layer indices from 0 to 3$"
    with pytest.raises(ValueError, match=message):
        check_stages([only(StageConfig(window_share=0.5, full_attention_layers=layers))], start, *rest)


@pytest.mark.parametrize("training, off", [("none", "none"), ("static", "static"), ("meta", "static")])
def test_validation_reads_off_and_on(training, off):
    assert evaluation_modes(training, has_inner_loop=True) == {"off": off, "on": "meta"}
    assert evaluation_modes(training, has_inner_loop=False) == {"off": off}


LONG_META = StageConfig(mode="meta", context="long")
WRONG = {
    "sinks without a window": (
        Stages(B0=StageConfig(attention="dense", sink_tokens=4)), {}, {}, "stage B0: sink_tokens 4 has no effect with attention dense",
    ),
    "no sinks where there is no window": (
        Stages(B0=StageConfig(attention="dense", sink_tokens=0)), {}, {}, "stage B0: sink_tokens 0 has no effect with attention dense",
    ),
    "layers to keep where all are kept": (
        Stages(B0=StageConfig(attention="dense", full_attention_layers=[1])), {}, {},
        r"stage B0: full_attention_layers \[1\] has no effect with attention dense",
    ),
    "a chunk that does not divide": (
        Stages(B2=B2, C=C), {"chunk": 48}, {}, r"stage B2: context 256 is not a multiple of size\.chunk 48",
    ),
    "a chunk that divides the short context only": (
        Stages(C=LONG_META), {"long": 1000, "tokens_per_step": 4000, "chunk": 64}, {"tokens": 4000},
        "stage C: context 1000 is not a multiple",
    ),
    "a single chunk": (Stages(B2=B2, C=C), {"chunk": 256}, {}, r"stage B2: context 256 is a single chunk.*lower size\.chunk"),
    "a chunk above the context": (Stages(B2=B2, C=C), {"chunk": 512}, {}, "stage B2: context 256 is not a multiple"),
    "first order is TTT too": (
        Stages(C=StageConfig(mode="first_order")), {"chunk": 256}, {}, "stage C: context 256 is a single chunk",
    ),
    "a step that is no whole sequences": (
        Stages(B1=B1, C=C), {"tokens_per_step": 4096 + 256}, {"tokens": 100 * 4352},
        "stage C: .*4352 is not whole sequences of 1024 tokens on 1 devices; use a multiple of 1024",
    ),
    "a step below one sequence": (
        Stages(C=LONG_META), {"tokens_per_step": 512}, {"tokens": 512}, "stage C: .* use a multiple of 1024",
    ),
    "more devices than sequences": (
        Stages(C=LONG_META), {}, {"devices": 8}, "stage C: .* on 8 devices; use a multiple of 8192",
    ),
    "devices that do not divide": (Stages(B1=StageConfig()), {}, {"devices": 3}, "stage B1: .*use a multiple of 768"),
    "a window share without a window": (
        Stages(B0=StageConfig(attention="dense", window_share=0.5)), {}, {}, "stage B0: window_share 0.5 has no effect",
    ),
    "a stage that gets no step": (BRIDGE, {}, {"tokens": 2 * 4096}, "stage B1.* gets no optimiser step out of 2"),
    "two stages that take the rest": (
        Stages(B2=StageConfig(), C=C), {}, {}, "stages B2, C have no share, expected at most one",
    ),
    "shares above one": (
        Stages(B1=StageConfig(share=0.7), B2=StageConfig(share=0.7)), {}, {}, "shares of B1, B2 sum to 1.4",
    ),
    "shares below one": (
        Stages(B1=StageConfig(share=0.3), B2=StageConfig(share=0.3)), {}, {}, "shares of B1, B2 sum to 0.6, expected 1",
    ),
    "tokens that are no whole steps": (Stages(C=C), {}, {"tokens": 5000}, "5000 tokens are not whole .*use 4096 or 8192"),
}  # fmt: skip


@pytest.mark.parametrize("stages, size, given, message", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_an_error_that_says_where_and_what_to_do(stages, size, given, message):
    size = dataclasses.replace(DEMO, **size)
    with pytest.raises(ValueError, match=message) as excinfo:
        plan_stages(stages, size, Budget(tokens=given.get("tokens", 409_600)), devices=given.get("devices", 1))
    assert "\n" not in str(excinfo.value)


@pytest.mark.parametrize("mode", ["none", "static"])
def test_stages_without_updates_do_not_care_for_the_chunk(mode):
    plan = plan_stages(
        Stages(B1=StageConfig(mode=mode)), dataclasses.replace(DEMO, chunk=100), Budget(tokens=4096), devices=1
    )[0]
    assert plan.context == 256


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"window_share": 0.0}, "window_share: got 0"),
        ({"window_share": 1.5}, "window_share: got 1.5"),
        ({"sink_tokens": -1}, "sink_tokens: got -1"),
        ({"lr": 0.0}, "got lr 0"),
        ({"new_lr": -1.0}, "new_lr -1"),
        ({"lr": float("nan")}, "got lr nan"),
    ],
)
def test_impossible_stages_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StageConfig(**wrong)


@pytest.mark.parametrize("field", ["short", "long", "chunk", "window", "tokens_per_step", "micro_batch_tokens"])
def test_a_size_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=f"size: {field} is 0"):
        SizeConfig(**{field: 0})


def test_less_than_no_sinks_are_refused():
    with pytest.raises(ValueError, match="size: sink_tokens is -1, expected 0 or more"):
        SizeConfig(sink_tokens=-1)


def test_long_is_not_shorter_than_short():
    with pytest.raises(ValueError, match="long 128 is shorter than short 256"):
        dataclasses.replace(DEMO, long=128)
