"""Golden files made here: the layout of ``tests/golden``, computed by the naive twin and an AdamW written out by hand.

They reach what the official files do not: training with norms switched off, other depths, unusual shapes.
"""

import json
import math

import torch
from safetensors.torch import save_file

from ttt_lit.reference.layout import spec_from_case, state_from_reference
from ttt_lit.ttt.naive import sequence_nll_naive

CONFIG = {
    "mode": "meta", "ilr": 0.5, "clip": 1.0, "prime": True, "inner": "prime", "tie": False, "pre_norm": True,
    "post_norm": False, "qk_norm": False, "layers": 3, "suffix": 2, "hidden": 8, "inter": 6, "heads": 2, "vocab": 11,
    "chunk": 4, "window": 3, "seq": 8, "batch": 2, "block": "SWA", "theta": 100.0, "steps": 4, "ilr_warmup": 3,
    "ilr_init": 0.1,
}  # fmt: skip
MODEL = "language_model.model."


def stored_shapes(c):
    """Names and shapes as the reference stores them, norms that are switched off included."""
    layers, suffix, hidden, inter, head = c["layers"], c["suffix"], c["hidden"], c["inter"], c["hidden"] // c["heads"]
    block = {f"seq_modeling_block.{w}.weight": (hidden, hidden) for w in ("wq", "wk", "wv", "wo")}
    block |= {f"seq_modeling_block.{n}_norm.weight": (head,) for n in "qk"}
    block |= {f"{n}.weight": (hidden,) for n in ("seq_norm", "seq_post_norm", "ffn_norm", "ffn_post_norm")}
    mlp = {"w1": (hidden, inter), "w2": (inter, hidden), "w3": (hidden, inter)}
    block |= {f"feed_forward.{w}.weight": shape for w, shape in mlp.items()}
    shapes = {MODEL + "wte.weight": (c["vocab"], hidden), MODEL + "ln_f.weight": (hidden,)}
    shapes |= {f"{MODEL}h.blocks.{name}": (layers, *shape) for name, shape in block.items()}
    if c["prime"]:
        prime = {f"feed_forward_prime.{w}.weight": shape for w, shape in mlp.items()}
        prime |= {"ffn_prime_norm.weight": (hidden,), "ffn_prime_post_norm.weight": (hidden,)}
        shapes |= {f"{MODEL}h.prime_storage.{name}": (suffix, *shape) for name, shape in prime.items()}
    if not c["tie"]:
        shapes["language_model.lm_head.weight"] = (hidden, c["vocab"])
    return shapes


def write_golden(path, *, weight_decay=0.1, idle_decay=True, **changes):
    """Write a case. ``weight_decay`` and ``idle_decay`` are wrong on purpose where a test wants a trainer that forgets them."""
    config = CONFIG | changes | {"name": path.stem}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (1.0 if "norm" in name or "ln_f" in name else 0.0) + 0.3 * torch.randn(shape, generator=generator)
        for name, shape in stored_shapes(config).items()
    }
    shape = (config["steps"], config["batch"], config["seq"] + 1)
    tokens = torch.randint(config["vocab"], shape, generator=generator, dtype=torch.int32)
    tensors = {"tokens": tokens} | {f"weight.{n}": w.clone() for n, w in weights.items()}
    current = {name: w.double() for name, w in weights.items()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in current.items()}
    losses = []
    for step in range(config["steps"]):
        nll, gradients = _losses_and_gradients(config, current, tokens[step].long(), step)
        losses.append(nll.mean())
        if step == 0:
            tensors |= {"loss": nll.mean().reshape(1), "token_nll": nll}
            tensors |= {f"grad.{name}": g for name, g in gradients.items()}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        scale = min(1.0, 1.0 / norm.item())
        for name, gradient in gradients.items():
            decay = weight_decay if idle_decay or gradient.any() else 0.0
            current[name] = _adamw(current[name], scale * gradient, moments[name], step, decay)
    if config["steps"] > 1:
        tensors |= {"losses": torch.stack(losses)} | {f"final.{name}": w for name, w in current.items()}
    floats = {n: t.contiguous() if t.dtype == torch.int32 else t.float().contiguous() for n, t in tensors.items()}
    save_file(floats, path, metadata={"config": json.dumps(config)})
    return path


def _losses_and_gradients(config, stored, tokens, step):
    leaves = {name: w.clone().requires_grad_() for name, w in stored.items()}
    spec = spec_from_case(config)
    mode = "meta" if config["mode"] == "meta" else "static" if config["prime"] else "none"
    warm = min(1.0, (step + 1) / config["ilr_warmup"]) if config["ilr_warmup"] else 1.0
    lr = config["ilr_init"] + (config["ilr"] - config["ilr_init"]) * warm
    ours = state_from_reference(spec, leaves)
    nll = torch.stack(
        [
            sequence_nll_naive(ours, spec, row, mode=mode, chunk=config["chunk"], inner_lr=lr, clip=config["clip"])
            for row in tokens
        ]
    )
    gradients = torch.autograd.grad(nll.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return nll.detach(), dict(zip(leaves, gradients, strict=True))


def _adamw(weight, gradient, moments, step, decay):
    lr = 1e-3 * step / 2 if step < 2 else 1e-5 + 0.99e-3 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 2) / 8)))
    first, second = moments
    first.mul_(0.9).add_(0.1 * gradient)
    second.mul_(0.95).add_(0.05 * gradient.square())
    direction = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    return weight - lr * (direction + decay * weight)
