"""A stage with a teacher minimises cross-entropy + weight · KL(imported model ‖ network), and no gradient reaches the teacher."""

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_same_tensors, gradients_of
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.convert.windowed import windowed
from ttt_lit.model.spec import LayerSpec
from ttt_lit.train.teacher import Teacher
from ttt_lit.ttt.scan import Teaching, sequence_loss
from ttt_lit.ttt.settings import KEEP_ALL, EngineConfig

DENSE = tiny_spec(LayerSpec(), LayerSpec(), tied_head=False)
STUDENT = windowed(tiny_spec(LayerSpec(), ttt_layer(), tied_head=False), 3)


def loss_of(student, teacher, tokens, *, mode, weight, engine=KEEP_ALL):
    out = sequence_loss(student, tokens, mode=mode, chunk=4, inner_lr=0.0, clip=0.0, engine=engine, teacher=teacher)
    return out, out.loss + weight * out.token_kl.mean(dtype=torch.float64)


def plain_loss(student, teacher, tokens, *, mode, weight):
    """From whole logits, by autograd."""
    logits = student(tokens[:, :-1], use_prime=mode == "static")
    theirs = torch.log_softmax(teacher(tokens[:, :-1]), -1).detach()
    ours = torch.log_softmax(logits, -1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + weight * kl


@pytest.mark.parametrize("engine", [KEEP_ALL, EngineConfig()], ids=["keep all", "recompute"])
@pytest.mark.parametrize("mode", ["none", "static"])
@pytest.mark.parametrize("weight", [0.3, 4.0])
def test_loss_and_every_gradient_are_those_of_the_plain_sum(mode, weight, engine):
    student, teacher = random_decoder(STUDENT, seed=1), random_decoder(DENSE, seed=2)
    tokens = random_tokens(2, 13)
    _, loss = loss_of(student, Teacher(teacher)(tokens), tokens, mode=mode, weight=weight, engine=engine)
    loss.backward()
    got = {name: g.clone() for name, g in gradients_of(student).items()}
    student.zero_grad()
    plain = plain_loss(student, teacher, tokens, mode=mode, weight=weight)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert_same_tensors(got, gradients_of(student))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_of_equal_weights_and_attention_adds_nothing():
    student, tokens = random_decoder(DENSE, seed=1), random_tokens(2, 13)
    out, loss = loss_of(student, Teacher(student)(tokens), tokens, mode="none", weight=5.0)
    assert out.token_kl.abs().max() < 1e-12
    loss.backward()
    got = {name: g.clone() for name, g in gradients_of(student).items()}
    student.zero_grad()
    sequence_loss(student, tokens, mode="none", chunk=4, inner_lr=0.0, clip=0.0).loss.backward()
    assert_same_tensors(got, gradients_of(student), noise=1e-10)


def test_what_training_reports_is_the_loss_of_the_text_alone():
    student, tokens = random_decoder(STUDENT, seed=1), random_tokens(2, 13)
    teacher = Teacher(random_decoder(DENSE, seed=2))(tokens)
    out, _ = loss_of(student, teacher, tokens, mode="static", weight=1.0)
    alone = sequence_loss(student, tokens, mode="static", chunk=4, inner_lr=0.0, clip=0.0)
    torch.testing.assert_close(out.token_nll, alone.token_nll)
    assert (out.token_kl > 0).all()
    assert alone.token_kl is None


def test_a_teacher_in_half_precision_stays_near_the_one_in_full():
    """Weights in bfloat16, the stream between the layers in float32."""
    full = random_decoder(DENSE, seed=2).float()
    half = random_decoder(DENSE, seed=2).to(torch.bfloat16)
    tokens = random_tokens(2, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = Teacher(half)(tokens)
    whole = Teacher(full)(tokens)
    assert theirs.hidden.dtype == torch.float32
    assert (theirs.hidden - whole.hidden).norm() / whole.hidden.norm() < 0.03  # bfloat16 has 8 bits
    student = random_decoder(STUDENT, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = loss_of(student, theirs, tokens, mode="none", weight=1.0)
    exact, _ = loss_of(student, Teaching(*whole), tokens, mode="none", weight=1.0)
    torch.testing.assert_close(out.token_kl.mean(), exact.token_kl.mean(), rtol=0.05, atol=1e-3)
