"""One of two ranks that train; the second one alone gets a signal, in the middle of an optimiser step.

Arguments: TERM or USR2, a file that the cluster's handler writes on rank 0 when it has put the job back, and those of ``fit``.
"""

import os
import signal
import sys
import time
from pathlib import Path

import lightning as L

from ttt_lit.train.run import assemble


class TellRankOne(L.Callback):
    def __init__(self, number):
        self.number, self.seen = number, 0

    def on_train_batch_start(self, trainer, *_):
        self.seen += 1
        if self.seen == 5 and trainer.global_rank == 1:  # a micro-batch is a step here
            os.kill(os.getpid(), self.number)


def requeue_into(path):
    """As submitit's handler: slow, and it ends the process of rank 0; on other ranks it does nothing."""

    def requeue(*_):
        if int(os.environ["RANK"]) == 0:
            time.sleep(1.5)
            path.write_text("rank 0")
            sys.exit(-1)

    return requeue


if __name__ == "__main__":
    number, requeued = getattr(signal, f"SIG{sys.argv[1]}"), Path(sys.argv[2])
    signal.signal(signal.SIGUSR2, requeue_into(requeued))
    parts = assemble(sys.argv[3:], command="fit")
    parts.trainer.callbacks.append(TellRankOne(number))
    try:
        parts.trainer.fit(parts.module, datamodule=parts.data)
    except SystemExit:
        print("left after the job was put back" if requeued.exists() else "stopped", flush=True)
    # Without this, a rank that is still shutting down looks to torchrun like one that failed.
    os._exit(0)
