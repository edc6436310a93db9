"""bfloat16 compute under autocast: fast weights, steps and sums stay float32, and the exact gradient is no noisier than a plain one."""

import pytest
import torch
from helpers.compare import ENGINES, gradients_of, scan
from helpers.tiny import decoder_of, random_state, random_tokens, tiny_spec, ttt_layer

from ttt_lit.model.spec import LayerSpec
from ttt_lit.ttt.reading import Reading

# Relative error of the gradient as a whole. bfloat16 keeps 8 bits; without any inner loop this model's is 0.036.
PLAIN, META = 0.05, 0.06


def spec():
    layers = (LayerSpec(window=12), ttt_layer(window=12, width=48), ttt_layer(window=12, width=48))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return tiny_spec(*layers, **sizes, vocab_size=64, qkv_bias=True)


def read(dtype, mode, *, autocast, engine="recompute"):
    state = {name: (t / 2 if t.ndim > 1 else t).to(dtype) for name, t in random_state(spec()).items()}
    decoder = decoder_of(spec(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = scan(decoder, random_tokens(2, 65, vocab=64), mode=mode, chunk=16, engine=ENGINES[engine])
    out.loss.backward()
    return out, gradients_of(decoder)


def distance(got, wanted):
    squares = sum((got[name].double() - wanted[name]).square().sum() for name in wanted)
    return float((squares / sum(g.square().sum() for g in wanted.values())).sqrt())


@pytest.mark.parametrize("mode, limit", [("static", PLAIN), ("first_order", META), ("meta", META)])
def test_the_gradient_under_autocast_is_near_the_exact_one(mode, limit):
    exact_out, exact = read(torch.float64, mode, autocast=False)
    out, gradients = read(torch.float32, mode, autocast=True)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert out.token_nll.dtype == out.update_norms.dtype == torch.float32
    assert abs(out.loss - exact_out.loss) < 5e-3
    assert distance(gradients, exact) < limit


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_as_near(engine):
    _, exact = read(torch.float64, "meta", autocast=False)
    assert distance(read(torch.float32, "meta", autocast=True, engine=engine)[1], exact) < META


def test_what_would_be_missing_is_far_larger_than_the_noise():
    assert (
        distance(read(torch.float64, "first_order", autocast=False)[1], read(torch.float64, "meta", autocast=False)[1])
        > 5 * META
    )


def test_fast_weights_and_their_steps_are_float32(monkeypatch):
    seen = []
    step = Reading.inner_step

    def spy(self, *arguments, **keywords):
        result = step(self, *arguments, **keywords)
        _, new, taken, factors = result
        seen.append((new, taken, factors))
        return result

    monkeypatch.setattr(Reading, "inner_step", spy)
    read(torch.float32, "meta", autocast=True)
    assert len(seen) == 3
    for new, taken, factors in seen:
        assert {w.dtype for weights in new.values() for w in weights} == {torch.float32}
        assert taken.rate.dtype == taken.length.dtype == torch.float32
        assert {t.dtype for f in factors.values() for t in f} == {torch.bfloat16}
    moved = [(a - b).abs().max() for a, b in zip(seen[1][0][1], seen[0][0][1], strict=True)]
    assert min(moved) > 0  # steps far below the spacing of bfloat16 would be lost in bfloat16 weights
