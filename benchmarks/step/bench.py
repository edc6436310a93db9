"""The network with prime MLPs, the dense one that shares its other weights, their optimiser, and a step of any arm."""

import argparse
import contextlib
import functools
import gc
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from step.arms import Arm
from step.devices import Cpu, Cuda
from step.naive import naive_loss
from step.shapes import make_specs
from step.theirs import transformers_loss, transformers_model
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import ModelSpec
from ttt_lit.ttt.compiled import wants_compilation
from ttt_lit.ttt.model import TTTModel

INNER = {"inner_lr": 1.0, "clip": 1.0}
STD = 0.02


class Bench:
    """One set of weights on one device, read by every arm; gradients are absent before and after every measurement."""

    def __init__(self, arguments: argparse.Namespace, sizes: Mapping[str, int], device: Cpu | Cuda) -> None:
        self.arguments, self.sizes, self.device = arguments, sizes, device
        self.specs = make_specs(arguments.shape, sizes)
        self.compiled = wants_compilation(arguments.compile, torch.device(device.name))
        self.precision = arguments.precision
        with torch.device(device.name):
            decoder = Decoder(self.specs["ttt"])
        decoder.initialise(STD, torch.Generator(device.name).manual_seed(0))
        self.decoder, self.model = decoder, TTTModel(decoder)
        self.dense = TTTModel(_sharing(decoder, self.specs["dense"]))
        self.optimizer = _adamw(decoder, device) if arguments.optimizer == "adamw" else None
        self.tokens = torch.empty(0)

    @functools.cached_property
    def theirs(self) -> nn.Module:
        return transformers_model(self.dense.decoder)

    @property
    def context(self) -> int:
        return self.tokens.shape[1] - 1

    def draw(self, context: int) -> None:
        shape = (self.arguments.batch, context + 1)
        tokens = torch.randint(self.sizes["vocab"], shape, generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(self.device.name)

    def model_of(self, arm: Arm) -> TTTModel:
        return self.dense if arm.kind == "dense" else self.model

    def prepare(self, arm: Arm) -> None:
        """Everything of a step that is not timed."""
        if arm.network != "dense":
            self.decoder.set_spec(self.specs[arm.network])
        if arm.engine is not None:
            self.model_of(arm).engine = arm.engine
        self.decoder.zero_grad(set_to_none=True)
        gc.collect()

    def forward_backward(self, arm: Arm) -> Tensor:
        chunk, half = self.sizes["chunk"], self.precision == "bf16"
        with torch.autocast(self.device.name, dtype=torch.bfloat16, enabled=half):
            if arm.kind.startswith("naive"):
                recompute = arm.kind == "naive_recompute"
                loss = naive_loss(self.decoder, self.tokens, chunk=chunk, recompute=recompute, **INNER)
            elif arm.kind == "transformers":
                loss = transformers_loss(self.theirs, self.tokens)
            else:
                loss = self.model_of(arm)(self.tokens, mode=arm.mode, chunk=chunk, **INNER).loss
        loss.backward()
        return loss.detach()

    def step(self, arm: Arm) -> Tensor:
        loss = self.forward_backward(arm)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss

    def peak(self, arm: Arm) -> int:
        """Bytes beyond parameters and the optimiser's state."""
        self.prepare(arm)
        found = self.device.peak(lambda: self.forward_backward(arm), [*self.decoder.parameters(), self.tokens])
        self.decoder.zero_grad(set_to_none=True)
        return found

    def peak_or_infinity(self, arm: Arm) -> float:
        found = math.inf
        with contextlib.suppress(torch.OutOfMemoryError):
            found = self.peak(arm)
        if found == math.inf:
            self.clear()
        return found

    def clear(self) -> None:
        self.decoder.zero_grad(set_to_none=True)
        self.device.clear()

    def take_gradients(self) -> dict[str, Tensor]:
        """Gradients by name; absent ones are left out."""
        found = {n: p.grad for n, p in self.decoder.named_parameters() if p.grad is not None}
        self.decoder.zero_grad(set_to_none=True)
        return found


def _sharing(decoder: Decoder, spec: ModelSpec) -> Decoder:
    """A network of this spec whose every parameter is the decoder's own; what the spec lacks, it does not have."""
    with torch.device("meta"):
        found = Decoder(spec)
    theirs = dict(decoder.named_parameters())
    found.load_state_dict({name: theirs[name] for name, _ in found.named_parameters()}, assign=True)
    assert all(p is theirs[name] for name, p in found.named_parameters())
    return found


def _adamw(decoder: Decoder, device: Cpu | Cuda) -> torch.optim.AdamW:
    # The rate is 0: every arm and round sees the same weights, and the work is the same.
    return torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.1, fused=device.name == "cuda")
