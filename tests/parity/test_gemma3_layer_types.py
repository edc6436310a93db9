"""In transformers a Gemma layer's type chooses its mask and its RoPE base together; here they are two settings."""

import dataclasses

import pytest
import torch
from gemma3_variants import FULL, SLIDING
from redescribed import decoder, exported, save_as

from ttt_lit.checkpoint.importing import import_checkpoint
from ttt_lit.convert.windowed import windowed
from ttt_lit.model.decoder import Decoder

WINDOW = 8
GLOBAL_LAYER = 5
# Float32 summation order, relative to the largest logit.
ROUNDING = 1e-4


def imported(folder, tmp_path, quiet):
    return import_checkpoint(str(folder), str(tmp_path / "ours"), parity=False, console=quiet)


def logits_of(spec, state, tokens):
    model = Decoder(spec)
    model.load_state_dict(state)
    return model(tokens)


def tokens_of(length):
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(3))


def test_a_sliding_type_rotates_otherwise_in_transformers_and_a_window_of_ours_does_not(hf_model, tmp_path, quiet):
    """On a text within the window no mask can matter: what differs there is the RoPE base alone."""
    from transformers import AutoModelForCausalLM

    theirs, folder = hf_model("gemma3")
    checkpoint = imported(folder, tmp_path, quiet)
    spec, state, tokens = checkpoint.spec, checkpoint.state(), tokens_of(WINDOW - 1)
    original = theirs(input_ids=tokens).logits
    types = [SLIDING] * 7
    assert [i for i, kind in enumerate(theirs.config.layer_types) if kind == FULL] == [GLOBAL_LAYER]
    sliding = AutoModelForCausalLM.from_pretrained(folder, layer_types=types, attn_implementation="eager")
    assert (sliding(input_ids=tokens).logits - original).abs().max() > 0.01

    narrow = windowed(spec, WINDOW)
    assert narrow.layers[GLOBAL_LAYER] == dataclasses.replace(spec.layers[GLOBAL_LAYER], window=WINDOW)
    assert torch.equal(logits_of(narrow, state, tokens), logits_of(spec, state, tokens))
    assert (logits_of(narrow, state, tokens) - original).abs().max() <= ROUNDING * original.abs().max()
    # Both settings changed by hand: the model that transformers makes of the type.
    layers = (*narrow.layers[:GLOBAL_LAYER], narrow.layers[0], *narrow.layers[GLOBAL_LAYER + 1 :])
    difference = logits_of(narrow.with_layers(layers), state, tokens) - sliding(input_ids=tokens).logits
    assert difference.abs().max() <= ROUNDING * original.abs().max()


def test_a_windowed_global_layer_is_not_exported_as_another_model(hf_model, tmp_path, quiet):
    _, folder = hf_model("gemma3")
    checkpoint = imported(folder, tmp_path, quiet)
    narrow = save_as(checkpoint, windowed(checkpoint.spec, WINDOW), tmp_path / "windowed")
    with pytest.raises(ValueError, match=r"layers \[5\] have window 8 and RoPE base 500 "):
        exported(narrow, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_windows_everywhere_are_the_same_in_transformers_where_both_bases_are_equal(hf_model, tmp_path, quiet):
    theirs, folder = hf_model("gemma3", rope_local_base_freq=500.0)
    checkpoint = imported(folder, tmp_path, quiet)
    narrow = save_as(checkpoint, windowed(checkpoint.spec, WINDOW), tmp_path / "windowed")
    again = exported(narrow, tmp_path / "back")
    tokens = tokens_of(3 * WINDOW)
    logits = again(input_ids=tokens).logits
    assert (decoder(narrow)(tokens) - logits).abs().max() <= ROUNDING * logits.abs().max()
    assert (theirs(input_ids=tokens).logits - logits).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_scale_is_rounded_to_the_dtype_as_in_transformers(hf_model, tmp_path, quiet, dtype):
    """sqrt(32) has no exact value in either dtype; a product in another one would differ in the last bit."""
    theirs, folder = hf_model("gemma3", dtype=dtype)
    checkpoint, tokens = imported(folder, tmp_path, quiet), tokens_of(61)
    assert torch.equal(theirs.get_input_embeddings()(tokens), decoder(checkpoint).embed(tokens))
