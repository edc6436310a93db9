"""One of two ranks that train; the second one alone gets SIGTERM, in the middle of an optimiser step."""

import os
import signal
import sys

import lightning as L

from ttt_lit.train.run import assemble


class TellRankOne(L.Callback):
    def __init__(self):
        self.seen = 0

    def on_train_batch_start(self, trainer, *_):
        self.seen += 1
        if self.seen == 5 and trainer.global_rank == 1:  # a micro-batch is a step here
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    parts = assemble(sys.argv[1:], command="fit")
    parts.trainer.callbacks.append(TellRankOne())
    try:
        parts.trainer.fit(parts.module, datamodule=parts.data)
    except SystemExit:
        print("stopped", flush=True)
    # Without this, a rank that is still shutting down looks to torchrun like one that failed.
    os._exit(0)
