# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Device code of the expert MLP: the two grouped products with the activation in their epilogue.

Both read their left operand through order[r] // K, the token of row r, so that x[token] and dy[token] are never
written: of (2 K + 1) T D elements a permutation moves, K T D are left, and those mostly come from L2. Row r's routing
weight lies at its slot order[r]. WEIGHTING says where it enters, as `mlp.py` defines it: "after", "before" or "none".

The formulae are those of `swiglu.py`. Everything between a product and its store is fp32.
"""

from ._triton import tl, triton
from .grouped_kernels import rows_tile, weight_operand, weight_tile
from .tiles import tile_of

__all__ = ["columns_backward", "swiglu_backward_kernel", "swiglu_kernel"]


@triton.jit
def swiglu_kernel(
    p_x,
    p_w,
    p_order,
    p_weight,
    p_h,
    p_a,
    p_tiles,
    p_count,
    n_experts,
    n_in,
    n_hidden,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    INPUTS_LAST: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTING: tl.constexpr,
    KEEP: tl.constexpr,
):
    """h[r] = x[token r] @ w[e(r)].T and a[r] = silu(gate) up of it, with w (E, 2F, D): a tile of gate and the one of up
    that belongs to it per step. h is for the backward pass: stored if KEEP.

    4 R D F FLOP; (R D + 2 E D F + 3 R F) elements moved. With enough rows the tensor cores are the limit: on an H200
    (780 TFLOP/s, 4.3 TB/s) storing h and a in 16 bits takes 272 / D of the product's time, 13 % at D = 2048.
    """
    n_in = n_in // UNIT * UNIT
    n_hidden = n_hidden // UNIT * UNIT
    n_out = 2 * n_hidden
    w = weight_operand(p_w, n_experts, n_in, n_out, BK, BN, INPUTS_LAST, TMA)
    n_row_tiles = tl.load(p_count)
    n_col_tiles = tl.cdiv(n_hidden, BN)
    for work in tl.range(tl.program_id(0), n_row_tiles * n_col_tiles, tl.num_programs(0)):
        expert, first, last, col_tile = tile_of(work, p_tiles, n_row_tiles, n_col_tiles, GROUP)
        o_row = first + tl.arange(0, BM)
        m_row = o_row < last
        slot = tl.load(p_order + o_row, mask=m_row, other=0)  # surplus rows are token 0, and are not stored
        token = (slot // TOP_K).to(tl.int64)
        col = col_tile * BN
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k in range(0, n_in, BK):
            b_x = rows_tile(p_x, first, token, k, n_in, BK, EVEN, False)
            b_gate = weight_tile(w, expert, k, col, n_in, n_out, BK, BN, EVEN, INPUTS_LAST, TMA)
            b_up = weight_tile(w, expert, k, n_hidden + col, n_in, n_out, BK, BN, EVEN, INPUTS_LAST, TMA)
            gate = tl.dot(b_x, b_gate, gate, input_precision=PRECISION)
            up = tl.dot(b_x, b_up, up, input_precision=PRECISION)
        o_f = col + tl.arange(0, BN)
        mask = m_row[:, None] & (o_f < n_hidden)[None, :]
        if KEEP:
            p_gate = p_h + o_row.to(tl.int64)[:, None] * n_out + o_f[None, :]
            tl.store(p_gate, gate.to(p_h.dtype.element_ty), mask=mask)
            tl.store(p_gate + n_hidden, up.to(p_h.dtype.element_ty), mask=mask)
        weight = tl.load(p_weight + slot, mask=m_row, other=0.0)[:, None]
        if WEIGHTING == "before":
            gate *= weight
            up *= weight
        a = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHTING == "after":
            a *= weight
        p_at = p_a + o_row.to(tl.int64)[:, None] * n_hidden + o_f[None, :]
        tl.store(p_at, a.to(p_a.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    p_dy,
    p_w,
    p_order,
    p_weight,
    p_h,
    p_dh,
    p_a,
    p_dweight,
    p_tiles,
    p_count,
    n_experts,
    n_in,
    n_hidden,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    INPUTS_LAST: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTING: tl.constexpr,
):
    """q[r] = dy[token r] @ w[e(r)] with w (E, D, F), never written, and from it and h: dh, a as the forward had it, and
    dweight[slot, column tile], this tile's share of the routing weight's gradient, to be added up afterwards in order.

    2 R D F FLOP; (R D + E D F + 5 R F) elements moved: reading h and storing dh and a takes 907 / D of the product's
    time on an H200, 44 % at D = 2048, so that the memory is the limit below D = 1000.
    """
    n_in = n_in // UNIT * UNIT
    n_hidden = n_hidden // UNIT * UNIT
    w = weight_operand(p_w, n_experts, n_in, n_hidden, BK, BN, INPUTS_LAST, TMA)
    n_row_tiles = tl.load(p_count)
    n_col_tiles = tl.cdiv(n_hidden, BN)
    for work in tl.range(tl.program_id(0), n_row_tiles * n_col_tiles, tl.num_programs(0)):
        expert, first, last, col_tile = tile_of(work, p_tiles, n_row_tiles, n_col_tiles, GROUP)
        o_row = first + tl.arange(0, BM)
        m_row = o_row < last
        slot = tl.load(p_order + o_row, mask=m_row, other=0)
        token = (slot // TOP_K).to(tl.int64)
        col = col_tile * BN
        q = tl.zeros((BM, BN), tl.float32)
        for k in range(0, n_in, BK):
            b_dy = rows_tile(p_dy, first, token, k, n_in, BK, EVEN, False)
            b_w = weight_tile(w, expert, k, col, n_in, n_hidden, BK, BN, EVEN, INPUTS_LAST, TMA)
            q = tl.dot(b_dy, b_w, q, input_precision=PRECISION)
        weight = tl.load(p_weight + slot, mask=m_row, other=0.0)[:, None]
        # Half the columns at a time: gate, up and what becomes of them take five times q's registers, and spill in one.
        left, right = q.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        HALF: tl.constexpr = BN // 2
        row = o_row.to(tl.int64)
        dweight = columns_backward(left, weight, p_h, p_dh, p_a, row, m_row, col, n_hidden, HALF, WEIGHTING)
        dweight += columns_backward(right, weight, p_h, p_dh, p_a, row, m_row, col + HALF, n_hidden, HALF, WEIGHTING)
        if WEIGHTING != "none":
            tl.store(p_dweight + slot.to(tl.int64) * n_col_tiles + col_tile, dweight, mask=m_row)


@triton.jit
def columns_backward(q, weight, p_h, p_dh, p_a, row, m_row, col, n_hidden, BN: tl.constexpr, WEIGHTING: tl.constexpr):
    """Store dh and a of the columns from col on; return their share of dweight (BM,), which "none" does not have."""
    o_f = col + tl.arange(0, BN)
    mask = m_row[:, None] & (o_f < n_hidden)[None, :]
    o_gate = row[:, None] * (2 * n_hidden) + o_f[None, :]
    h_gate = tl.load(p_h + o_gate, mask=mask, other=0.0).to(tl.float32)
    h_up = tl.load(p_h + o_gate + n_hidden, mask=mask, other=0.0).to(tl.float32)
    gate = h_gate
    up = h_up
    if WEIGHTING == "before":
        gate *= weight
        up *= weight
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    a = silu * up
    dweight = tl.sum(q * a, 1)
    if WEIGHTING == "after":
        a *= weight
        q *= weight
    d_gate = q * up * (sigmoid + silu * (1.0 - sigmoid))
    d_up = q * silu
    if WEIGHTING == "before":
        dweight = tl.sum(d_gate * h_gate + d_up * h_up, 1)
        d_gate *= weight
        d_up *= weight
    tl.store(p_dh + o_gate, d_gate.to(p_dh.dtype.element_ty), mask=mask)
    tl.store(p_dh + o_gate + n_hidden, d_up.to(p_dh.dtype.element_ty), mask=mask)
    tl.store(p_a + row[:, None] * n_hidden + o_f[None, :], a.to(p_a.dtype.element_ty), mask=mask)
    return dweight
