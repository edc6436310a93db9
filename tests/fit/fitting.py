"""Real runs for tests, and a callback that notes what they did."""

import time

import lightning as L
import tiny

from ttt_lit.train.run import assemble


class Shapes(L.Callback):
    """What every micro-batch and every stage start looked like."""

    def __init__(self):
        self.batches, self.primes, self.moments = [], {}, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        plan = module.plan
        self.batches.append((plan.name, plan.config.mode, tuple(batch["tokens"].shape)))
        if plan.name not in self.primes:
            named = dict(module.model.decoder.named_parameters())
            state = module.optimizers().optimizer.state
            self.primes[plan.name] = {n: p.detach().clone() for n, p in named.items() if "prime" in n}
            self.moments[plan.name] = {
                n: {part: value.clone() for part, value in state[p].items()} for n, p in named.items()
            }


class StoppedClock(L.Callback):
    """For the first place: the ledger's clock stands still, but for ``tick``."""

    def __init__(self):
        self.now = 0.0

    def on_train_start(self, trainer, module):
        module.ledger._clock = lambda: self.now

    def tick(self, function):
        """The same function, which takes one second."""

        def slow(*arguments, **others):
            self.now += 1.0
            return function(*arguments, **others)

        return slow


def run(world, runs, *extra, steps=20, callbacks=()):
    parts = assemble(tiny.arguments(world, runs, *extra, steps=steps), command="fit")
    parts.trainer.callbacks.extend(callbacks)
    began = time.monotonic()
    parts.trainer.fit(parts.module, datamodule=parts.data)
    parts.wall = time.monotonic() - began
    return parts
