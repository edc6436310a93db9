"""The Triton kernels behind ``triton_attention``: one pass over tiles of windowed attention and its derivatives each.

Formulas are those of ``triton_attention``. Every matrix argument is contiguous with rows of HEAD_DIM values, (heads, rows, HEAD_DIM), and
every statistic is (heads, Tq) float32; heads stands for B · Hq or B · Hkv. A program owns the rows that it writes, so no two programs add
to one address: there are no atomics and two runs give the same bits.

- A query-side program owns BLOCK_Q queries of one query head and walks over the keys that they see: tiles of sinks that lie before every
  window, then the windows.
- A key-side program owns BLOCK_K keys of one key head and walks over the queries that see them, in every query head of the group. It works
  on transposed tiles (keys down, queries across), because its results are products of the transposed weights.

SINKS is a constant of a compilation: a network has one number of them, and without any no kernel has a trace of them.

Matrix products take operands in the dtype of the inputs and sum in float32; weights and their derivatives are float32 until they become
an operand. "ieee" matters for float32 inputs only, which the default would round to TF32. Heads are padded to PADDED_DIM, a power of two,
with zeros. The offset of a head is a 64-bit product; inside a head 32 bits reach 2³¹ values, 8 million rows at D = 256.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# The hardware's exponential and logarithm have base two.
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

# Lengths change from call to call, above all while carried keys fill the window. They lie in no address of a vector load other than as
# multiples of HEAD_DIM, so compiling anew for lengths that 16 divides would buy nothing.
_LENGTHS = ["num_queries", "num_keys", "window", "group", "num_new", "first_key", "end_key"]


@triton.jit
def _load(
    pointer: tl.tensor, rows: tl.tensor, num_rows: tl.tensor, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
) -> tl.tensor:
    """Rows of a (num_rows, HEAD_DIM) matrix as (rows, PADDED_DIM); what lies outside the matrix is zero."""
    columns = tl.arange(0, PADDED_DIM)[None, :]
    inside = (rows[:, None] >= 0) & (rows[:, None] < num_rows) & (columns < HEAD_DIM)
    return tl.load(pointer + rows[:, None] * HEAD_DIM + columns, mask=inside, other=0.0)


@triton.jit
def _store(
    pointer: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
) -> None:
    """Write (rows, PADDED_DIM) into the rows of a (num_rows, HEAD_DIM) matrix, rounded to its dtype."""
    columns = tl.arange(0, PADDED_DIM)[None, :]
    inside = (rows[:, None] < num_rows) & (columns < HEAD_DIM)
    tl.store(pointer + rows[:, None] * HEAD_DIM + columns, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _scores(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x yᵀ in float32."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def _add_scores(total: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """total + x yᵀ."""
    return tl.dot(x, tl.trans(y), total, input_precision="ieee")


@triton.jit
def _add_product(total: tl.tensor, weights: tl.tensor, y: tl.tensor) -> tl.tensor:
    """total + weights y, with the weights rounded to the dtype of y."""
    return tl.dot(weights.to(y.dtype), y, total, input_precision="ieee")


@triton.jit
def _row_dot(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def _visible(
    rows: tl.tensor,
    keys: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    window: tl.tensor,
    SINKS: tl.constexpr,
) -> tl.tensor:
    """Whether the query of a row sees the key. The caller orients ``rows`` and ``keys``, so it serves both kinds of tile.

    Rows beyond the last query need no mask: the query side does not store them, and on the key side their operands and statistics are
    zeros, which add nothing. Queries see no key beyond the last.
    """
    position = rows + (num_keys - num_queries)
    near = keys > position - window
    if SINKS > 0:
        near = near | (keys < SINKS)
    return (keys <= position) & near


@triton.jit
def _weights(scores: tl.tensor, lse: tl.tensor, visible: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """p = exp(scale · scores − lse), zero where the key is hidden. Hidden before the exponential, which could overflow there."""
    exponent = tl.where(visible, scores * (scale * LOG2_E) - lse * LOG2_E, float("-inf"))
    return tl.exp2(exponent)


@triton.jit
def _keys_in_reach(
    first_row: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    window: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """first, low, high: the windows of the BLOCK_Q queries from ``first_row`` on hold the keys low … high − 1. Tiles start at ``first``:
    those before ``low`` stand for the sinks before it."""
    position = first_row + (num_keys - num_queries)
    low = tl.maximum(position - window + 1, 0)
    first = low
    if SINKS > 0:
        first = low - (tl.minimum(low, SINKS) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    return first, low, tl.minimum(position + BLOCK_Q, num_keys)


@triton.jit
def _keys_of_tile(
    start: tl.tensor,
    first: tl.tensor,
    low: tl.tensor,
    num_keys: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The keys of a tile as ``_keys_in_reach`` lays them out. What is beyond the sinks there belongs to nobody: it comes after all keys."""
    keys = start + tl.arange(0, BLOCK_K)
    if SINKS > 0:
        sinks = keys - first
        sinks = tl.where(sinks < tl.minimum(low, SINKS), sinks, num_keys)
        keys = tl.where(start < low, sinks, keys)
    return keys


@triton.jit
def _queries_in_reach(
    first_key: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    window: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """[low, high): the queries that see any of the BLOCK_K keys from ``first_key`` on. Empty where low ≥ high."""
    row = first_key - (num_keys - num_queries)
    high = tl.minimum(row + BLOCK_K - 1 + window, num_queries)
    if SINKS > 0:
        high = tl.where(first_key < SINKS, num_queries, high)
    return tl.maximum(row, 0), high


@triton.jit
def _first_tangent_tile(
    first: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    first_new: tl.tensor,
    SINKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Where the tiles begin to contain keys from ``first_new`` on; ``high`` if they never do."""
    tile = tl.minimum(low + tl.maximum(first_new - low, 0) // BLOCK_K * BLOCK_K, high)
    if SINKS > 0:
        tile = tl.where(first_new < tl.minimum(low, SINKS), first, tile)
    return tile


@triton.jit(do_not_specialize=_LENGTHS)
def forward_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, o_ptr: tl.tensor, lse_ptr: tl.tensor,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """o and lse of BLOCK_Q queries."""
    head = tl.program_id(1).to(tl.int64)
    of_queries, of_keys = head * num_queries, head // group * num_keys
    first_row = tl.program_id(0) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    # A tile may hide all its keys from a row. A finite start keeps −inf − peak well defined there: such weights are zero.
    peak = tl.full([BLOCK_Q], -1e38, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    first, low, high = _keys_in_reach(first_row, num_queries, num_keys, window, SINKS, BLOCK_Q, BLOCK_K)
    for start in range(first, high, BLOCK_K):
        keys = _keys_of_tile(start, first, low, num_keys, SINKS, BLOCK_K)
        k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
        v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
        visible = _visible(rows[:, None], keys[None, :], num_queries, num_keys, window, SINKS)
        scores = tl.where(visible, _scores(q, k) * (scale * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - new_peak)
        p = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = _add_product(out * shrink[:, None], p, v)
        peak = new_peak
    # Rows beyond the last query may have seen nothing; they are not stored, and must not divide by zero.
    total = tl.where(rows < num_queries, total, 1.0)
    _store(o_ptr + of_queries * HEAD_DIM, out / total[:, None], rows, num_queries, HEAD_DIM, PADDED_DIM)
    tl.store(lse_ptr + of_queries + rows, (peak + tl.log2(total)) * LN_2, mask=rows < num_queries)


@triton.jit(do_not_specialize=_LENGTHS)
def backward_query_kernel(
    do_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, o_ptr: tl.tensor, lse_ptr: tl.tensor,
    dq_ptr: tl.tensor, delta_ptr: tl.tensor,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dq of BLOCK_Q queries, and delta = rowsum(do ∘ o) for the key side."""
    head = tl.program_id(1).to(tl.int64)
    of_queries, of_keys = head * num_queries, head // group * num_keys
    first_row = tl.program_id(0) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    do = _load(do_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    o = _load(o_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    lse = tl.load(lse_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
    delta = _row_dot(do, o)
    tl.store(delta_ptr + of_queries + rows, delta, mask=rows < num_queries)
    dq = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    first, low, high = _keys_in_reach(first_row, num_queries, num_keys, window, SINKS, BLOCK_Q, BLOCK_K)
    for start in range(first, high, BLOCK_K):
        keys = _keys_of_tile(start, first, low, num_keys, SINKS, BLOCK_K)
        k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
        v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
        visible = _visible(rows[:, None], keys[None, :], num_queries, num_keys, window, SINKS)
        p = _weights(_scores(q, k), lse[:, None], visible, scale)
        dq = _add_product(dq, p * (_scores(do, v) - delta[:, None]), k)
    _store(dq_ptr + of_queries * HEAD_DIM, dq * scale, rows, num_queries, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=_LENGTHS)
def backward_key_kernel(
    do_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, lse_ptr: tl.tensor, delta_ptr: tl.tensor,
    dk_ptr: tl.tensor, dv_ptr: tl.tensor,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    num_new: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of BLOCK_K of the trailing ``num_new`` keys."""
    kv_head = tl.program_id(1).to(tl.int64)
    of_keys, of_new = kv_head * num_keys, kv_head * num_new
    new_keys = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_key = num_keys - num_new + tl.program_id(0) * BLOCK_K
    keys = first_key + tl.arange(0, BLOCK_K)
    k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
    v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
    dk = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    low, high = _queries_in_reach(first_key, num_queries, num_keys, window, SINKS, BLOCK_K)
    for member in range(group):
        of_queries = (kv_head * group + member) * num_queries
        for start in range(low, high, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
            do = _load(do_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
            lse = tl.load(lse_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            delta = tl.load(delta_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            visible = _visible(rows[None, :], keys[:, None], num_queries, num_keys, window, SINKS)
            p = _weights(_scores(k, q), lse[None, :], visible, scale)
            dv = _add_product(dv, p, do)
            dk = _add_product(dk, p * (_scores(v, do) - delta[None, :]), q)
    _store(dk_ptr + of_new * HEAD_DIM, dk * scale, new_keys, num_new, HEAD_DIM, PADDED_DIM)
    _store(dv_ptr + of_new * HEAD_DIM, dv, new_keys, num_new, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=_LENGTHS)
def jvp_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, o_ptr: tl.tensor, lse_ptr: tl.tensor, tq_ptr: tl.tensor,
    tk_ptr: tl.tensor, tv_ptr: tl.tensor, to_ptr: tl.tensor, mu_ptr: tl.tensor,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    num_new: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """to and mu of BLOCK_Q queries, in one sweep: Σ p ts v + p tv does not need mu before its end."""
    head = tl.program_id(1).to(tl.int64)
    of_queries, of_keys, of_new = head * num_queries, head // group * num_keys, head // group * num_new
    first_row = tl.program_id(0) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    tq = _load(tq_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    lse = tl.load(lse_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
    mu = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    first_new = num_keys - num_new
    first, low, high = _keys_in_reach(first_row, num_queries, num_keys, window, SINKS, BLOCK_Q, BLOCK_K)
    middle = _first_tangent_tile(first, low, high, first_new, SINKS, BLOCK_K)
    # Compiled twice: first the tiles whose keys are all constants, then those that have tangents.
    for TANGENTS in tl.static_range(2):
        for start in range(middle if TANGENTS else first, high if TANGENTS else middle, BLOCK_K):
            keys = _keys_of_tile(start, first, low, num_keys, SINKS, BLOCK_K)
            k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
            v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
            visible = _visible(rows[:, None], keys[None, :], num_queries, num_keys, window, SINKS)
            p = _weights(_scores(q, k), lse[:, None], visible, scale)
            ts = _scores(tq, k)
            if TANGENTS:
                tk = _load(tk_ptr + of_new * HEAD_DIM, keys - first_new, num_new, HEAD_DIM, PADDED_DIM)
                tv = _load(tv_ptr + of_new * HEAD_DIM, keys - first_new, num_new, HEAD_DIM, PADDED_DIM)
                ts = _add_scores(ts, q, tk)
                out = _add_product(out, p, tv)
            weighted = p * (ts * scale)
            mu += tl.sum(weighted, 1)
            out = _add_product(out, weighted, v)
    o = _load(o_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    out -= mu[:, None] * o.to(tl.float32)
    _store(to_ptr + of_queries * HEAD_DIM, out, rows, num_queries, HEAD_DIM, PADDED_DIM)
    tl.store(mu_ptr + of_queries + rows, mu, mask=rows < num_queries)


@triton.jit(do_not_specialize=_LENGTHS)
def dual_query_kernel(
    do_ptr: tl.tensor | None, dto_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor,
    o_ptr: tl.tensor, lse_ptr: tl.tensor, to_ptr: tl.tensor, mu_ptr: tl.tensor, tq_ptr: tl.tensor, tk_ptr: tl.tensor,
    tv_ptr: tl.tensor, dq_ptr: tl.tensor, dtq_ptr: tl.tensor, dh_ptr: tl.tensor, e_ptr: tl.tensor,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    num_new: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dq and dtq of BLOCK_Q queries, and the row sums dh and e for the key side. ``do_ptr`` None: do is zero."""
    head = tl.program_id(1).to(tl.int64)
    of_queries, of_keys, of_new = head * num_queries, head // group * num_keys, head // group * num_new
    first_row = tl.program_id(0) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    dto = _load(dto_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    o = _load(o_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    dh = _row_dot(dto, o)
    e = _row_dot(dto, _load(to_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM))
    if do_ptr is not None:
        do = _load(do_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
        e += _row_dot(do, o)
    tl.store(dh_ptr + of_queries + rows, dh, mask=rows < num_queries)
    tl.store(e_ptr + of_queries + rows, e, mask=rows < num_queries)
    q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    tq = _load(tq_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
    lse = tl.load(lse_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
    mu = tl.load(mu_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
    dq = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    dtq = tl.zeros([BLOCK_Q, PADDED_DIM], tl.float32)
    first_new = num_keys - num_new
    first, low, high = _keys_in_reach(first_row, num_queries, num_keys, window, SINKS, BLOCK_Q, BLOCK_K)
    middle = _first_tangent_tile(first, low, high, first_new, SINKS, BLOCK_K)
    # Compiled twice: first the tiles whose keys are all constants, then those that have tangents.
    for TANGENTS in tl.static_range(2):
        for start in range(middle if TANGENTS else first, high if TANGENTS else middle, BLOCK_K):
            keys = _keys_of_tile(start, first, low, num_keys, SINKS, BLOCK_K)
            k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
            v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
            visible = _visible(rows[:, None], keys[None, :], num_queries, num_keys, window, SINKS)
            p = _weights(_scores(q, k), lse[:, None], visible, scale)
            ts = _scores(tq, k)
            dp = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            if do_ptr is not None:
                dp = _add_scores(dp, do, v)
            if TANGENTS:
                tk = _load(tk_ptr + of_new * HEAD_DIM, keys - first_new, num_new, HEAD_DIM, PADDED_DIM)
                tv = _load(tv_ptr + of_new * HEAD_DIM, keys - first_new, num_new, HEAD_DIM, PADDED_DIM)
                ts = _add_scores(ts, q, tk)
                dp = _add_scores(dp, dto, tv)
            a = _scores(dto, v) - dh[:, None]
            dst = p * a
            dtq = _add_product(dtq, dst, k)
            dq = _add_product(dq, p * (dp - e[:, None] + (ts * scale - mu[:, None]) * a), k)
            if TANGENTS:
                dq = _add_product(dq, dst, tk)
    _store(dq_ptr + of_queries * HEAD_DIM, dq * scale, rows, num_queries, HEAD_DIM, PADDED_DIM)
    _store(dtq_ptr + of_queries * HEAD_DIM, dtq * scale, rows, num_queries, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=_LENGTHS)
def dual_key_kernel(
    do_ptr: tl.tensor | None, dto_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor,
    lse_ptr: tl.tensor, mu_ptr: tl.tensor, dh_ptr: tl.tensor, e_ptr: tl.tensor, tq_ptr: tl.tensor,
    tk_ptr: tl.tensor | None, tv_ptr: tl.tensor | None, dk_ptr: tl.tensor, dv_ptr: tl.tensor, dtk_ptr: tl.tensor | None,
    dtv_ptr: tl.tensor | None,
    scale: tl.tensor, num_queries: tl.tensor, num_keys: tl.tensor, window: tl.tensor, group: tl.tensor,
    first_key: tl.tensor, end_key: tl.tensor,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """dk, dv, dtk and dtv of BLOCK_K of the keys ``first_key`` … ``end_key`` − 1: either all of them have tangents or none has.

    With tangents, tk, tv, dtk and dtv have a row for each of these keys; without, all four are None. ``do_ptr`` None: do is zero.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    of_keys, of_new = kv_head * num_keys, kv_head * (end_key - first_key)
    new_keys = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = first_key + new_keys
    k = _load(k_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
    v = _load(v_ptr + of_keys * HEAD_DIM, keys, num_keys, HEAD_DIM, PADDED_DIM)
    dk = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    if tk_ptr is not None:
        tk = _load(tk_ptr + of_new * HEAD_DIM, new_keys, end_key - first_key, HEAD_DIM, PADDED_DIM)
        tv = _load(tv_ptr + of_new * HEAD_DIM, new_keys, end_key - first_key, HEAD_DIM, PADDED_DIM)
        dtk = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
        dtv = tl.zeros([BLOCK_K, PADDED_DIM], tl.float32)
    low, high = _queries_in_reach(first_key + tl.program_id(0) * BLOCK_K, num_queries, num_keys, window, SINKS, BLOCK_K)
    for member in range(group):
        of_queries = (kv_head * group + member) * num_queries
        for start in range(low, high, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _load(q_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
            tq = _load(tq_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
            dto = _load(dto_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
            lse = tl.load(lse_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            mu = tl.load(mu_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            dh = tl.load(dh_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            e = tl.load(e_ptr + of_queries + rows, mask=rows < num_queries, other=0.0)
            visible = _visible(rows[None, :], keys[:, None], num_queries, num_keys, window, SINKS)
            p = _weights(_scores(k, q), lse[None, :], visible, scale)
            ts = _scores(k, tq)
            dp = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
            if do_ptr is not None:
                do = _load(do_ptr + of_queries * HEAD_DIM, rows, num_queries, HEAD_DIM, PADDED_DIM)
                dp = _add_scores(dp, v, do)
                dv = _add_product(dv, p, do)
            if tk_ptr is not None:
                ts = _add_scores(ts, tk, q)
                dp = _add_scores(dp, tv, dto)
                dtv = _add_product(dtv, p, dto)
            a = _scores(v, dto) - dh[None, :]
            spread = ts * scale - mu[None, :]
            dst = p * a
            dv = _add_product(dv, p * spread, dto)
            dk = _add_product(dk, p * (dp - e[None, :] + spread * a), q)
            dk = _add_product(dk, dst, tq)
            if tk_ptr is not None:
                dtk = _add_product(dtk, dst, q)
    _store(dk_ptr + of_keys * HEAD_DIM, dk * scale, keys, end_key, HEAD_DIM, PADDED_DIM)
    _store(dv_ptr + of_keys * HEAD_DIM, dv, keys, end_key, HEAD_DIM, PADDED_DIM)
    if tk_ptr is not None:
        _store(dtk_ptr + of_new * HEAD_DIM, dtk * scale, new_keys, end_key - first_key, HEAD_DIM, PADDED_DIM)
        _store(dtv_ptr + of_new * HEAD_DIM, dtv, new_keys, end_key - first_key, HEAD_DIM, PADDED_DIM)
