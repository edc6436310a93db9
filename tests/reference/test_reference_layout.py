import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ttt_lit.model.decoder import Decoder
from ttt_lit.reference.layout import (
    sources,
    spec_from_case,
    state_from_reference,
    state_to_reference,
    switched_off,
)

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
PREFIX = "language_model.model.h."


def load(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return config, tensors


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_and_gradients_go_there_and_back(path):
    config, tensors = load(path)
    spec = spec_from_case(config)
    for prefix in ("weight.", "grad."):
        stored = part(tensors, prefix)
        state = state_from_reference(spec, stored)
        assert shapes(state) == spec.parameter_shapes()
        back = state_to_reference(spec, state, shapes(stored))
        off = switched_off(spec, stored)
        assert set(back) == set(stored)
        for name, tensor in stored.items():
            assert torch.equal(back[name], torch.zeros_like(tensor) if name in off else tensor), name


def test_switched_off_norms_are_named():
    config, tensors = load(next(path for path in GOLDEN if path.stem == "meta_qwen_like"))
    off = switched_off(spec_from_case(config), part(tensors, "weight."))
    assert len(off) == 5
    for name in off:
        assert not tensors["grad." + name].any()


@pytest.mark.parametrize("name", ["pretrain_dense", "pretrain_swa"])
def test_the_layout_is_right_because_the_numbers_are(name):
    """Loss and every gradient of the reference, through both directions of the map."""
    config, tensors = load(next(path for path in GOLDEN if path.stem == name))
    spec = spec_from_case(config)
    model = Decoder(spec).double()
    model.load_state_dict({k: v.double() for k, v in state_from_reference(spec, part(tensors, "weight.")).items()})
    tokens = tensors["tokens"][0].long()
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    expected = part(tensors, "grad.")
    found = state_to_reference(spec, {k: p.grad for k, p in model.named_parameters()}, shapes(expected))
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key


def test_rope_pairs_become_halves():
    spec = spec_from_case(load(next(path for path in GOLDEN if path.stem == "meta_paper"))[0])
    source = sources(spec)["layers.0.self_attn.q_norm.weight"]
    assert source.to_ours(torch.arange(8.0)).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    rows = sources(spec)["layers.0.self_attn.q_proj.weight"]
    stored = torch.arange(32.0).expand(32, 32)  # (in, out): every column holds its own index
    assert rows.to_ours(stored)[:, 0].tolist()[8:16] == [8, 10, 12, 14, 9, 11, 13, 15]


def test_prime_mlps_follow_the_flag_and_fast_weights_the_mode():
    base = load(next(path for path in GOLDEN if path.stem == "meta_paper"))[0]
    assert spec_from_case(base).ttt_layers == (2, 3)
    static = spec_from_case(base | {"mode": "pretrain"})
    assert static.ttt_layers == ()
    assert [layer.prime is not None for layer in static.layers] == [False, False, True, True]
    ffn = spec_from_case(base | {"prime": False, "inner": "ffn"})
    assert [layer.fast for layer in ffn.layers] == [None, None, "mlp", "mlp"]
    assert spec_from_case(base | {"block": "self_attention"}).layers[0].window is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block": "flash"}, "block"),
        ({"mode": "both"}, "mode"),
        ({"inner": "attn"}, "inner"),
        ({"suffix": 9}, "suffix"),
        ({"hidden": 33}, "hidden 33"),
        ({"theta": 0}, "theta"),
        ({"tie": "yes"}, "tie"),
        ({"prime": False}, "prime MLP"),
    ],
)
def test_impossible_cases_are_refused_by_name(change, message):
    base = load(next(path for path in GOLDEN if path.stem == "meta_paper"))[0]
    with pytest.raises(ValueError, match=message):
        spec_from_case(base | change)


def test_missing_extra_and_misshapen_tensors_are_all_named():
    config, tensors = load(next(path for path in GOLDEN if path.stem == "meta_paper"))
    spec, stored = spec_from_case(config), part(tensors, "weight.")
    del stored[PREFIX + "blocks.feed_forward.w1.weight"]
    stored[PREFIX + "blocks.surprise"] = torch.zeros(1)
    stored[PREFIX + "blocks.ffn_norm.weight"] = torch.zeros(3, 32)
    with pytest.raises(ValueError, match="missing.*w1.*extra.*surprise.*misshapen.*ffn_norm"):
        state_from_reference(spec, stored)
    with pytest.raises(ValueError, match="embed_tokens"):
        state_to_reference(spec, {"norm.weight": torch.zeros(32)}, shapes(part(tensors, "weight.")))
