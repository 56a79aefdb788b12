# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""Device code of the grouped products: operands by TMA or by pointer, the plain product, the gradient of the weights.

TMA (`make_tensor_descriptor`) has the copy engine of a Hopper GPU bring whole tiles, without registers for addresses;
it wants rows of 16 aligned bytes and no gathering. Everything else goes by pointer (`cp.async`). A tile of x may reach
over a group's end into the next expert's rows: they are multiplied and never stored. A tile of a weight does not: the
expert is a dimension of its own there, past whose edges the engine fills in zeros.

UNIT divides all widths: 16 bytes of elements where the host has seen that it does, else 1. Kernels round the widths
down to it, which changes nothing but what the compiler knows: by itself Triton tells widths that 16 divides from all
others, and of 8 it would load 16-bit elements one by one.

The kernels are persistent: a program takes every n-th tile, and makes its descriptors once. TMA addresses with 32 bits
per dimension, the pointers are 64 bits wide.
"""

from ._triton import tl, triton
from .tiles import side_by_side, tile_of

__all__ = ["product_kernel", "rows_operand", "rows_tile", "weight_operand", "weight_tile", "wgrad_kernel"]

# operands


@triton.jit
def rows_operand(p_x, n_rows, width, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """What tiles of x (n_rows, width) are loaded through: a descriptor of (BR, BC) blocks, or the pointer as it is."""
    x = tl.make_tensor_descriptor(p_x, [n_rows, width], [width, 1], [BR, BC]) if TMA else p_x
    return x


@triton.jit
def weight_operand(
    p_w, n_experts, n_in, n_out, BK: tl.constexpr, BN: tl.constexpr, INPUTS_LAST: tl.constexpr, TMA: tl.constexpr
):
    """The same for weights that lie (E, O, I) when INPUTS_LAST, else (E, I, O)."""
    if TMA:
        if INPUTS_LAST:
            w = tl.make_tensor_descriptor(p_w, [n_experts, n_out, n_in], [n_out * n_in, n_in, 1], [1, BN, BK])
        else:
            w = tl.make_tensor_descriptor(p_w, [n_experts, n_in, n_out], [n_out * n_in, n_out, 1], [1, BK, BN])
    else:
        w = p_w
    return w


@triton.jit
def rows_tile(x, first, row, k, width, BK: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr):
    """(BM, BK) of x from column k on: by TMA the rows from `first` on, by pointer those that `row` (int64) names.

    EVEN: BK divides the width, so that no mask is computed inside the loop along it.
    """
    if TMA:
        tile = x.load([first, k])
    else:
        o_in = k + tl.arange(0, BK)
        p_xt = x + row[:, None] * width + o_in[None, :]
        tile = tl.load(p_xt) if EVEN else tl.load(p_xt, mask=(o_in < width)[None, :], other=0.0)
    return tile


@triton.jit
def weight_tile(
    w,
    expert,
    k,
    col,
    n_in,
    n_out,
    BK: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    INPUTS_LAST: tl.constexpr,
    TMA: tl.constexpr,
):
    """(BK, BN) of one expert's weight, inputs from k on and outputs from col on; zero past its edges."""
    if TMA:
        tile = w.load([expert, col, k]).reshape(BN, BK).T if INPUTS_LAST else w.load([expert, k, col]).reshape(BK, BN)
    else:
        o_in = k + tl.arange(0, BK)
        o_out = col + tl.arange(0, BN)
        p_w = w + expert.to(tl.int64) * n_out * n_in
        if INPUTS_LAST:
            p_wt = p_w + o_out.to(tl.int64)[None, :] * n_in + o_in[:, None]
        else:
            p_wt = p_w + o_in.to(tl.int64)[:, None] * n_out + o_out[None, :]
        # Columns are masked, not wrapped: they may be the contiguous direction, and a wrapped index would hide that
        # from the compiler, which then neither vectorises nor pipelines the load.
        mask = (o_out < n_out)[None, :]
        if not EVEN:
            mask = mask & (o_in < n_in)[:, None]
        tile = tl.load(p_wt, mask=mask, other=0.0)
    return tile


# kernels


@triton.jit
def product_kernel(
    p_x,
    p_w,
    p_y,
    p_tiles,
    p_count,
    n_rows,
    n_experts,
    n_in,
    n_out,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    INPUTS_LAST: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """y[r, o] = sum_i x[r, i] w[e(r), o, i], tile by tile of y (R, O).

    2 R I O FLOP; (R I + E I O + R O) elements moved. With r rows per expert that is about r FLOP per byte of weights in
    16 bits: limited by the tensor cores from some 200 rows on, below by reading the weights.
    """
    n_in = n_in // UNIT * UNIT
    n_out = n_out // UNIT * UNIT
    x = rows_operand(p_x, n_rows, n_in, BM, BK, TMA)
    w = weight_operand(p_w, n_experts, n_in, n_out, BK, BN, INPUTS_LAST, TMA)
    n_row_tiles = tl.load(p_count)
    n_col_tiles = tl.cdiv(n_out, BN)
    n_work = n_row_tiles * n_col_tiles
    for work in tl.range(tl.program_id(0), n_work, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE):
        expert, first, last, col_tile = tile_of(work, p_tiles, n_row_tiles, n_col_tiles, GROUP)
        o_row = first + tl.arange(0, BM)
        m_row = o_row < last
        row = tl.where(m_row, o_row, first).to(tl.int64)  # surplus rows read what is there, and are not stored
        col = col_tile * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, n_in, BK):
            b_x = rows_tile(x, first, row, k, n_in, BK, EVEN, TMA)
            b_w = weight_tile(w, expert, k, col, n_in, n_out, BK, BN, EVEN, INPUTS_LAST, TMA)
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
        o_out = col + tl.arange(0, BN)
        p_yt = p_y + o_row.to(tl.int64)[:, None] * n_out + o_out[None, :]
        tl.store(p_yt, acc.to(p_y.dtype.element_ty), mask=m_row[:, None] & (o_out < n_out)[None, :])


@triton.jit
def summed_tile(
    x,
    p_x,
    p_order,
    row,
    end,
    col,
    width,
    TOP_K: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    GATHERED: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):
    """(BR, BC) of rows that are summed over, from `row` and col on; zero past the matrix' edge and, unless WHOLE, from
    row `end` on, where the next expert's rows are. GATHERED: of x[token] without its ever being written."""
    if TMA and WHOLE and not GATHERED:
        tile = x.load([row, col])
    else:
        o_row = row + tl.arange(0, BR)
        o_col = col + tl.arange(0, BC)
        mask = (o_col < width)[None, :]
        if WHOLE:
            if GATHERED:
                o_row = tl.load(p_order + o_row) // TOP_K
        else:
            m_row = o_row < end
            mask = mask & m_row[:, None]
            if GATHERED:
                o_row = tl.load(p_order + o_row, mask=m_row, other=0) // TOP_K
        tile = tl.load(p_x + o_row.to(tl.int64)[:, None] * width + o_col[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def wgrad_kernel(
    p_dy,
    p_x,
    p_order,
    p_dw,
    p_offsets,
    n_rows,
    n_experts,
    n_out,
    n_in,
    TOP_K: tl.constexpr,
    UNIT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    GATHER_DY: tl.constexpr,
    GATHER_X: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[e, o, i] = sum over the rows r of e of dy[r, o] x[r, i], tile by tile of dw (E, O, I); zeros without rows.

    What is gathered is read at order[r] // TOP_K instead of r. Whole steps of BR rows need no mask; the rest of a group
    is one more step, by pointer. 2 R I O FLOP; (R I + R O + E I O) elements moved, of which dw in fp32 counts twice:
    limited by the tensor cores from some 400 rows per expert on, below by writing dw.
    """
    n_in = n_in // UNIT * UNIT
    n_out = n_out // UNIT * UNIT
    dy = rows_operand(p_dy, n_rows, n_out, BR, BO, TMA and not GATHER_DY)
    x = rows_operand(p_x, n_rows, n_in, BR, BI, TMA and not GATHER_X)
    n_out_tiles = tl.cdiv(n_out, BO)
    n_in_tiles = tl.cdiv(n_in, BI)
    per_expert = n_out_tiles * n_in_tiles
    for work in tl.range(tl.program_id(0), n_experts * per_expert, tl.num_programs(0)):
        expert = work // per_expert
        out_tile, in_tile = side_by_side(work % per_expert, n_out_tiles, n_in_tiles, GROUP)
        o = out_tile * BO
        i = in_tile * BI
        start = tl.load(p_offsets + expert)
        end = tl.load(p_offsets + expert + 1)
        rest = start + (end - start) // BR * BR
        acc = tl.zeros((BO, BI), tl.float32)
        for r in range(start, rest, BR):
            b_dy = summed_tile(dy, p_dy, p_order, r, end, o, n_out, TOP_K, BR, BO, GATHER_DY, True, TMA)
            b_x = summed_tile(x, p_x, p_order, r, end, i, n_in, TOP_K, BR, BI, GATHER_X, True, TMA)
            acc = tl.dot(b_dy.T, b_x, acc, input_precision=PRECISION)
        if rest < end:
            b_dy = summed_tile(dy, p_dy, p_order, rest, end, o, n_out, TOP_K, BR, BO, GATHER_DY, False, TMA)
            b_x = summed_tile(x, p_x, p_order, rest, end, i, n_in, TOP_K, BR, BI, GATHER_X, False, TMA)
            acc = tl.dot(b_dy.T, b_x, acc, input_precision=PRECISION)
        o_out = o + tl.arange(0, BO)
        o_in = i + tl.arange(0, BI)
        p_dwt = p_dw + (expert.to(tl.int64) * n_out + o_out[:, None]) * n_in + o_in[None, :]
        tl.store(p_dwt, acc.to(p_dw.dtype.element_ty), mask=(o_out < n_out)[:, None] & (o_in < n_in)[None, :])
