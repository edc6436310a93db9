"""What tests ask of a stream."""

from ttt_lit.data.stream import StreamRequest


def request(**changes):
    defaults = {"dataset": "short", "split": "train", "block_tokens": 17, "batch_size": 4, "num_batches": 30}
    return StreamRequest(**defaults | changes)


def indices(stream):
    return [batch["index"].tolist() for batch in stream]
