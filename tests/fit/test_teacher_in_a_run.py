"""A run whose sliding-window stage has the imported model for a teacher."""

import lightning as L
import pytest
import tiny
import torch
import torch.nn.functional as F
from fitting import run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_continuing import run_until

from ttt_lit import metrics
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.model.decoder import Decoder
from ttt_lit.train import module as train_module
from ttt_lit.train.run import fit
from ttt_lit.train.teacher import make_teacher

NARROW = '"enabled": true, "share": 0.4, "window_share": 0.25, "lr": 1e-3'
TAUGHT = "--model.stages.B1={" + NARROW + ', "teacher_kl": 2.0}'
REST = ("--model.stages.B2=null", "--model.validation.every_share=0")


class Spy(L.Callback):
    """Weights, tokens and gradient of the first optimiser step, the teacher in every stage, and the groups' rates."""

    def __init__(self):
        self.tokens, self.gradients, self.teachers, self.reports = [], None, {}, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.teachers[module.plan.name] = len(module._teacher)
        if self.gradients is None:
            self.tokens.append(batch["tokens"])
            self.spec = module.stage_spec(module.plan)
            self.weights = {n: p.detach().clone() for n, p in module.model.decoder.named_parameters()}
            self.teacher = {n: p.clone() for n, p in module._teacher[0].decoder.named_parameters()}
        elif module._teacher:
            for name, parameter in module._teacher[0].decoder.named_parameters():
                assert torch.equal(parameter, self.teacher[name])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.gradients is None:
            named = module.model.decoder.named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, module, *_):
        if module.at_boundary:
            self.reports.append((module.plan.name, module.report))


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory):
    spy = Spy()
    parts = run(world, tmp_path_factory.mktemp("taught"), TAUGHT, *REST, steps=10, callbacks=[spy])
    return parts, spy


def network(spec, weights):
    decoder = Decoder(spec).double()
    decoder.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    return decoder


def test_the_gradient_of_an_optimiser_step_is_that_of_the_plain_sum(taught, world):
    _, spy = taught
    checkpoint = load_checkpoint(world / "checkpoint")
    student, teacher = network(spy.spec, spy.weights), network(checkpoint.spec, checkpoint.state())
    tokens = torch.cat(spy.tokens)
    logits = student(tokens[:, :-1], use_prime=False)
    ours, theirs = torch.log_softmax(logits, -1), torch.log_softmax(teacher(tokens[:, :-1]), -1).detach()
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 2.0 * kl).backward()
    report = spy.reports[0][1]
    assert report.teacher_kl == pytest.approx(kl.item(), rel=1e-4)
    for name, gradient in spy.gradients.items():
        wanted = student.get_parameter(name).grad
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm(), name


def test_only_the_stage_that_asks_for_it_has_one_and_tensorboard_shows_the_divergence(taught):
    parts, spy = taught
    assert spy.teachers == {"B1": 1, "C": 0}
    divergences = [report.teacher_kl for stage, report in spy.reports if stage == "B1"]
    assert [report.teacher_kl for stage, report in spy.reports if stage == "C"] == [None] * 6
    events = EventAccumulator(str(parts.run.folder), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.value for event in events.Scalars(metrics.TEACHER_KL)] == pytest.approx(divergences)


def test_it_is_no_part_of_the_run_that_is_trained_or_saved(taught):
    parts, _ = taught
    names = {name for name, _ in parts.module.named_parameters()}
    assert names == {f"_model.decoder.{name}" for name, _ in parts.module.model.decoder.named_parameters()}
    saved = load_file(parts.run.folder / "checkpoints" / "B1" / "model.safetensors")
    assert saved.keys() == dict(parts.module.model.decoder.named_parameters()).keys()


# 5: resumed from the end of the stage with a teacher, when nobody needs it any more.
@pytest.mark.parametrize("steps, loads", [(3, 2), (5, 1)])
def test_a_run_that_was_cut_off_with_a_teacher_ends_bit_for_bit_like_one_that_was_not(
    taught, world, tmp_path, monkeypatch, steps, loads
):
    """Whenever the teacher is read, its seconds are no training."""
    arguments, booked = tiny.arguments, []

    def noting(origin, trainer, *rest, **others):
        ledger = trainer.lightning_module.ledger
        booked.append((ledger.stage, ledger._account))
        return make_teacher(origin, trainer, *rest, **others)

    monkeypatch.setattr(train_module, "make_teacher", noting)
    monkeypatch.setattr(tiny, "arguments", lambda world, runs: arguments(world, runs, TAUGHT, *REST, steps=10))
    run_until(world, tmp_path, steps)
    assert fit(tiny.arguments(world, tmp_path)) == 0
    assert booked == [("B1", "checkpoint")] * loads
    whole, cut = (
        load_file(folder / "checkpoints" / "C" / "model.safetensors")
        for folder in (taught[0].run.folder, tmp_path / "tiny" / "default")
    )
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_teacher_holds_the_student_nearer_to_the_imported_model(taught, world, tmp_path):
    _, spy = taught
    light = "--model.stages.B1={" + NARROW + ', "teacher_kl": 1e-6}'
    other = Spy()
    run(world, tmp_path, light, *REST, steps=10, callbacks=[other])
    taught_kl, light_kl = ([r.teacher_kl for stage, r in each.reports if stage == "B1"][-1] for each in (spy, other))
    assert taught_kl < light_kl


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--model.start.init=scratch", TAUGHT), "stage B1: teacher_kl 2: a run from random weights has no imported"),
        (('--model.stages.B1={"enabled": true, "share": 0.4, "mode": "meta", "teacher_kl": 1.0}',), "with mode meta"),
        (
            ('--model.stages.B1={"enabled": true, "share": 0.4, "teacher_kl": -1.0}',),
            "teacher_kl: got -1.0, expected a",
        ),
    ],
)
def test_a_teacher_is_refused_where_there_is_none_or_nothing_to_teach(world, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path, *extra, *REST, steps=10)


ONLY = '--model.stages.{}={{"enabled": true, "mode": "none", "share": null}}'


@pytest.mark.parametrize(
    "first, differs",
    [
        # Each differs from the imported model in one thing alone.
        (("--model.ttt=null", ONLY.format("B1")), "windows"),
        ((ONLY.format("B0"), "--model.stages.B1=null"), "prime MLPs"),
        (("--model.ttt=null", ONLY.format("B0"), "--model.stages.B1=null"), "weights"),
    ],
    ids=["windows", "prime MLPs", "weights"],
)
def test_what_a_run_has_changed_is_no_teacher(world, tmp_path, first, differs):
    rest = ("--model.stages.B2=null", "--model.stages.C=null", "--model.validation.damage_blocks=0")
    before = run(world, tmp_path, *first, *rest, "--run.id=before", steps=2).run.folder
    (path,) = (path for path in (before / "checkpoints").glob("B?") if path.is_dir())
    imported, changed = (load_checkpoint(each).spec for each in (world / "checkpoint", path))
    windows = [layer.window for layer in imported.layers] != [layer.window for layer in changed.layers]
    assert (windows, bool(changed.ttt_layers)) == (differs == "windows", differs == "prime MLPs")
    start = (f"--model.start.init_from={path}", "--model.ttt=null")
    with pytest.raises(
        ValueError, match="the teacher is the start checkpoint, but that one is a training run's and no"
    ):
        run(world, tmp_path, *start, TAUGHT, *REST, steps=10)
