from ttt_lit.train.live_bytes import LiveBytes  # noqa: F401
