# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""The activation between the two products of an expert, scaled by the routing weight, and its gradient.

    forward    wa = w silu(gate) up                           h = [gate | up] (R, 2F), w (R,) fp32 -> wa (R, F)
    backward   dw = sum_f q silu(gate) up,   da = w q         q (R, F) = dy @ down
               dgate = da up sigmoid(gate) (1 + gate (1 - sigmoid(gate))),   dup = da silu(gate)

The weight is applied here, in fp32 before the one rounding to the storage dtype, so that the rows of a token need only
be added afterwards. wa is computed again in the backward instead of being kept. Letters: R rows, F hidden.

Example: h = [0 | 3], w = 0.5 -> wa = 0; with q = 2: dw = 0, dgate = 0.5 * 2 * 3 * 0.5 = 1.5, dup = 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ._triton import on_device_of, tl, triton

__all__ = ["swiglu_backward", "swiglu_forward"]

# torch reference

# Rows taken at a time, so that the fp32 intermediates stay in the cache: 12288 x 128 bf16 backward 4.5 ms of one core
# against 9.2 ms in one piece, forward 1.7 against 2.3.
_ROWS = 2048


def _forward_torch(h: Tensor, w: Tensor) -> Tensor:
    wa = h.new_empty(h.shape[0], h.shape[1] // 2)
    for rows in _blocks(h):
        gate, up = (half.float() for half in h[rows].chunk(2, dim=-1))
        torch.mul(silu(gate).mul_(up), w[rows, None], out=wa[rows])
    return wa


def _backward_torch(q: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh, wa, dw = torch.empty_like(h), torch.empty_like(q), torch.empty_like(w)
    for rows in _blocks(h):
        gate, up = (half.float() for half in h[rows].chunk(2, dim=-1))
        d_gate, d_up = dh[rows].chunk(2, dim=-1)
        s, w_rows = silu(gate), w[rows, None]
        a = s * up
        torch.sum(q[rows].float() * a, -1, out=dw[rows])
        torch.mul(a, w_rows, out=wa[rows])
        da = q[rows].float() * w_rows
        torch.mul(s, da, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(da.mul_(up), gate))
    return dh, wa, dw


def _blocks(h: Tensor) -> list[slice]:
    step = _ROWS if h.device.type == "cpu" else max(h.shape[0], 1)
    return [slice(start, start + step) for start in range(0, h.shape[0], step)]


# kernels


@triton.jit
def swiglu_kernel(p_h, p_w, p_wa, n_rows, n_hidden, BR: tl.constexpr, BF: tl.constexpr):
    """wa (R, F) of h (R, 2F) and w (R,), one (BR, BF) tile per program."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (o_r < n_rows)[:, None] & (o_f < n_hidden)[None, :]
    row = o_r.to(tl.int64)[:, None]
    p_gate = p_h + row * (2 * n_hidden) + o_f[None, :]
    gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_gate + n_hidden, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(p_w + o_r, mask=o_r < n_rows, other=0.0)[:, None]
    wa = gate / (1.0 + tl.exp(-gate)) * up * w
    tl.store(p_wa + row * n_hidden + o_f[None, :], wa.to(p_wa.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(p_q, p_h, p_w, p_dh, p_wa, p_dw, n_rows, n_hidden, BR: tl.constexpr, BF: tl.constexpr):
    """dh, wa and dw of BR rows per program, which walks along F so that dw needs no second pass."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    m_r = o_r < n_rows
    row = o_r.to(tl.int64)[:, None]
    w = tl.load(p_w + o_r, mask=m_r, other=0.0)[:, None]
    dw = tl.zeros((BR,), tl.float32)
    for f in range(0, n_hidden, BF):
        o_f = f + tl.arange(0, BF)[None, :]
        mask = m_r[:, None] & (o_f < n_hidden)
        o_gate = row * (2 * n_hidden) + o_f
        o_a = row * n_hidden + o_f
        gate = tl.load(p_h + o_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(p_h + o_gate + n_hidden, mask=mask, other=0.0).to(tl.float32)
        q = tl.load(p_q + o_a, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        a = gate * sigmoid * up
        dw += tl.sum(q * a, 1)
        da = q * w
        d_gate = da * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = da * gate * sigmoid
        tl.store(p_dh + o_gate, d_gate.to(p_dh.dtype.element_ty), mask=mask)
        tl.store(p_dh + o_gate + n_hidden, d_up.to(p_dh.dtype.element_ty), mask=mask)
        tl.store(p_wa + o_a, (w * a).to(p_wa.dtype.element_ty), mask=mask)
    tl.store(p_dw + o_r, dw, mask=m_r)


# launchers

SWIGLU_BLOCK = (8, 256)  # rows, hidden columns
SWIGLU_WARPS = 4


def _forward_triton(h: Tensor, w: Tensor) -> Tensor:
    n_rows, hidden = h.shape[0], h.shape[1] // 2
    wa = h.new_empty(n_rows, hidden)
    if wa.numel():
        rows, cols = SWIGLU_BLOCK
        with on_device_of(h):
            swiglu_kernel[(triton.cdiv(n_rows, rows), triton.cdiv(hidden, cols))](
                h, w, wa, n_rows, hidden, BR=rows, BF=cols, num_warps=SWIGLU_WARPS
            )
    return wa


def _backward_triton(q: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, hidden = q.shape
    dh, wa, dw = torch.empty_like(h), torch.empty_like(q), torch.zeros_like(w)
    if q.numel():
        rows, cols = SWIGLU_BLOCK
        with on_device_of(h):
            swiglu_backward_kernel[(triton.cdiv(n_rows, rows),)](
                q, h, w, dh, wa, dw, n_rows, hidden, BR=rows, BF=cols, num_warps=SWIGLU_WARPS
            )
    return dh, wa, dw


# by backend


def swiglu_forward(h: Tensor, w: Tensor, backend: str) -> Tensor:
    """wa (R, F) of contiguous h (R, 2F) and fp32 w (R,)."""
    return _forward_triton(h, w) if backend == "triton" else _forward_torch(h, w)


def swiglu_backward(q: Tensor, h: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dh (R, 2F), wa (R, F), dw (R,) fp32) of contiguous q (R, F), h (R, 2F) and fp32 w (R,)."""
    return _backward_triton(q, h, w) if backend == "triton" else _backward_torch(q, h, w)
