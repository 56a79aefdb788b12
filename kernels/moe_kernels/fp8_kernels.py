# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Device code of the fp8 products and of the activation between them.

A step multiplies 128 numbers of the sum in 8 bits, from zero, and its result times the step's scales is added to the
accumulator in fp32. So scales may differ from step to step, and the tensor cores of Hopper, whose own sums keep some 14
bits, never add more than 128 products (DeepSeek-V3, arXiv:2412.19437 §3.3.2). Both operands lie with the sum last.
"""

from ._triton import tl, triton
from .grouped_kernels import rows_operand, rows_tile, weight_operand, weight_tile
from .mlp_kernels import columns_backward
from .quantise import largest_of, quantised
from .tiles import side_by_side, tile_of

__all__ = ["fp8_product_kernel", "fp8_wgrad_kernel", "swiglu_quantise_kernel", "swiglu_rows_backward_kernel"]


@triton.jit
def fp8_product_kernel(
    p_x,
    p_x_scale,
    p_w,
    p_w_scale,
    p_order,
    p_y,
    p_tiles,
    p_count,
    n_rows,
    n_experts,
    n_in,
    n_out,
    TOP_K: tl.constexpr,
    GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """y[r, o] = sum_i x[r, i] w[e(r), o, i], tile by tile of y (R, O); n_in is a multiple of BK. A step has a scale for
    each row of x and one for w, for BN columns share a block of it. GATHERED: x is read at order[r] // TOP_K.

    2 R I O FLOP; R I + E I O bytes and R O numbers moved.
    """
    n_blocks = n_in // BK
    n_in = n_blocks * BK  # so the compiler knows what divides it
    x = rows_operand(p_x, n_rows, n_in, BM, BK, TMA and not GATHERED)
    w = weight_operand(p_w, n_experts, n_in, n_out, BK, BN, True, TMA)
    n_row_tiles = tl.load(p_count)
    n_col_tiles = tl.cdiv(n_out, BN)
    for work in tl.range(tl.program_id(0), n_row_tiles * n_col_tiles, tl.num_programs(0)):
        expert, first, last, col_tile = tile_of(work, p_tiles, n_row_tiles, n_col_tiles, GROUP)
        o_row = first + tl.arange(0, BM)
        m_row = o_row < last
        # surplus rows read what is there, and are not stored
        row = tl.load(p_order + o_row, mask=m_row, other=0) // TOP_K if GATHERED else tl.where(m_row, o_row, first)
        source = row.to(tl.int64)
        col = col_tile * BN
        p_row_scale = p_x_scale + source * n_blocks
        p_block_scale = p_w_scale + (expert.to(tl.int64) * tl.cdiv(n_out, BK) + col // BK) * n_blocks
        acc = tl.zeros((BM, BN), tl.float32)
        for block in range(0, n_blocks):
            b_x = rows_tile(x, first, source, block * BK, n_in, BK, True, TMA and not GATHERED)
            b_w = weight_tile(w, expert, block * BK, col, n_in, n_out, BK, BN, True, True, TMA)
            scale = tl.load(p_row_scale + block) * tl.load(p_block_scale + block)
            acc += tl.dot(b_x, b_w) * scale[:, None]
        o_out = col + tl.arange(0, BN)
        p_yt = p_y + o_row.to(tl.int64)[:, None] * n_out + o_out[None, :]
        tl.store(p_yt, acc.to(p_y.dtype.element_ty), mask=m_row[:, None] & (o_out < n_out)[None, :])


@triton.jit
def fp8_wgrad_kernel(
    p_dy,
    p_dy_scale,
    p_x,
    p_x_scale,
    p_dw,
    p_starts,
    n_rows,
    n_experts,
    n_out,
    n_in,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """dw[e, o, i] = sum over the rows r of e of dy[o, r] x[i, r], both transposed and n_rows wide; expert e has the
    tiles of BR rows from starts[e] to starts[e + 1]. Zeros without rows.

    2 R I O FLOP; R (I + O) bytes and E I O numbers of dw moved.
    """
    n_rows = n_rows // BR * BR
    dy = rows_operand(p_dy, n_out, n_rows, BO, BR, TMA)
    x = rows_operand(p_x, n_in, n_rows, BI, BR, TMA)
    n_out_tiles = tl.cdiv(n_out, BO)
    n_in_tiles = tl.cdiv(n_in, BI)
    per_expert = n_out_tiles * n_in_tiles
    for work in tl.range(tl.program_id(0), n_experts * per_expert, tl.num_programs(0)):
        expert = work // per_expert
        out_tile, in_tile = side_by_side(work % per_expert, n_out_tiles, n_in_tiles, GROUP)
        o_out = out_tile * BO + tl.arange(0, BO)
        o_in = in_tile * BI + tl.arange(0, BI)
        m_out = o_out < n_out
        m_in = o_in < n_in
        out = tl.where(m_out, o_out, 0).to(tl.int64)
        inner = tl.where(m_in, o_in, 0).to(tl.int64)
        start = tl.load(p_starts + expert)
        p_out_scale = p_dy_scale + start.to(tl.int64) * n_out
        p_in_scale = p_x_scale + start.to(tl.int64) * n_in
        acc = tl.zeros((BO, BI), tl.float32)
        for tile in range(start, tl.load(p_starts + expert + 1)):
            b_dy = rows_tile(dy, out_tile * BO, out, tile * BR, n_rows, BR, True, TMA)
            b_x = rows_tile(x, in_tile * BI, inner, tile * BR, n_rows, BR, True, TMA)
            dy_scale = tl.load(p_out_scale + o_out, mask=m_out, other=0.0)
            x_scale = tl.load(p_in_scale + o_in, mask=m_in, other=0.0)
            acc += tl.dot(b_dy, b_x.T) * dy_scale[:, None] * x_scale[None, :]
            p_out_scale += n_out
            p_in_scale += n_in
        p_dwt = p_dw + (expert.to(tl.int64) * n_out + o_out[:, None]) * n_in + o_in[None, :]
        tl.store(p_dwt, acc.to(p_dw.dtype.element_ty), mask=m_out[:, None] & m_in[None, :])


@triton.jit
def swiglu_quantise_kernel(
    p_h,
    p_order,
    p_weight,
    p_end,
    p_q,
    p_scale,
    n_hidden,
    n_blocks,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ROUND: tl.constexpr,
):
    """a[r] = weight silu(gate) up of h (R, 2F), rounded to h's dtype as the backward pass has it, then quantised along
    rows up to end. A program has BM rows of one block of BK columns."""
    n_rows = tl.load(p_end)
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    block = tl.program_id(1)
    o_f = block * BK + tl.arange(0, BK)
    m_row = o_row < n_rows
    row = o_row.to(tl.int64)
    mask = m_row[:, None] & (o_f < n_hidden)[None, :]
    p_gate = p_h + row[:, None] * (2 * n_hidden) + o_f[None, :]
    gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_gate + n_hidden, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + tl.load(p_order + o_row, mask=m_row, other=0), mask=m_row, other=0.0)
    a = gate / (1.0 + tl.exp(-gate)) * up * weight[:, None]
    a = a.to(p_h.dtype.element_ty).to(tl.float32)
    largest = largest_of(a, 1)
    tl.store(
        p_q + row[:, None] * (n_blocks * BK) + o_f[None, :], quantised(a, largest[:, None], ROUND), mask=m_row[:, None]
    )
    tl.store(p_scale + row * n_blocks + block, tl.div_rn(largest, 448.0), mask=m_row)


@triton.jit
def swiglu_rows_backward_kernel(
    p_q, p_h, p_order, p_weight, p_end, p_dh, p_a, p_dweight, n_hidden, BM: tl.constexpr, BN: tl.constexpr
):
    """dh, a and dweight[slot] of BM rows up to end, from q (R, F) and h (R, 2F)."""
    n_rows = tl.load(p_end)
    o_row = tl.program_id(0) * BM + tl.arange(0, BM)
    m_row = o_row < n_rows
    row = o_row.to(tl.int64)
    slot = tl.load(p_order + o_row, mask=m_row, other=0)
    weight = tl.load(p_weight + slot, mask=m_row, other=0.0)[:, None]
    dweight = tl.zeros((BM,), tl.float32)
    for col in range(0, n_hidden, BN):
        o_f = col + tl.arange(0, BN)
        p_qt = p_q + row[:, None] * n_hidden + o_f[None, :]
        q = tl.load(p_qt, mask=m_row[:, None] & (o_f < n_hidden)[None, :], other=0.0).to(tl.float32)
        dweight += columns_backward(q, weight, p_h, p_dh, p_a, row, m_row, col, n_hidden, BN, "after")
    tl.store(p_dweight + slot, dweight, mask=m_row)
