from ttt_lit.plan.live_bytes import LiveBytes  # noqa: F401
