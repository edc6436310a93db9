"""The same weights under another description: our decoder, and what transformers makes of its export."""

import torch

from ttt_lit.checkpoint.export import export_checkpoint
from ttt_lit.checkpoint.receipt import LineageStep
from ttt_lit.checkpoint.store import save_checkpoint
from ttt_lit.model.decoder import Decoder


def decoder(checkpoint):
    with torch.device("meta"):
        model = Decoder(checkpoint.spec)
    model.load_state_dict({n: t.clone() for n, t in checkpoint.state().items()}, assign=True, strict=True)
    return model


def save_as(checkpoint, spec, path):
    """The checkpoint as a conversion that touches no tensor would save it."""
    return save_checkpoint(
        path,
        spec=spec,
        state=checkpoint.state(),
        family=checkpoint.family,
        receipt=checkpoint.receipt,
        lineage=(*checkpoint.lineage, LineageStep(operation="windowed")),
        source_config=checkpoint.source_config,
    )


def exported(checkpoint, path):
    """Export to ``path``, and the model that transformers loads from there."""
    from transformers import AutoModelForCausalLM

    export_checkpoint(str(checkpoint.path), str(path), engine="transformers")
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
