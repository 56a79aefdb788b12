# mypy: allow-untyped-defs
# (jit functions: Triton reads their annotations itself)
"""The activation between the two products of an expert, and its gradient with the routing weight folded in.

    forward    a = silu(gate) * up                            h = [gate | up] (R, 2F) -> a (R, F)
    backward   dw = sum_f q a,   wa = w a,   da = w q         q (R, F) = dy @ down, w (R,) fp32
               dgate = da up sigmoid(gate) (1 + gate (1 - sigmoid(gate))),   dup = da silu(gate)

a is computed again in the backward instead of being kept; arithmetic is fp32 whatever the storage.
Letters: R rows, F hidden.

Example: h = [0 | 3] -> a = 0; with q = 2, w = 0.5: dw = 0, wa = 0, dgate = 1 * 3 * 0.5 = 1.5, dup = 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ._triton import on_device_of, tl, triton

__all__ = ["swiglu_backward", "swiglu_forward"]

# torch reference


def _forward_torch(h: Tensor) -> Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return silu(gate).mul_(up).to(h.dtype)


def _backward_torch(q: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = h.float().chunk(2, dim=-1)
    q = q.float()
    s = silu(gate)
    a = s * up
    dw = (q * a).sum(-1)
    da = q * w[:, None]
    dh = torch.empty_like(h)
    hidden = gate.shape[1]
    dh[:, hidden:] = da * s
    dh[:, :hidden] = torch.ops.aten.silu_backward(da.mul_(up), gate)
    return dh, a.mul_(w[:, None]).to(h.dtype), dw


# kernels


@triton.jit
def swiglu_kernel(p_h, p_a, n_rows, n_hidden, BR: tl.constexpr, BF: tl.constexpr):
    """a (R, F) of h (R, 2F), one (BR, BF) tile per program."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (o_r < n_rows)[:, None] & (o_f < n_hidden)[None, :]
    row = o_r.to(tl.int64)[:, None]
    p_gate = p_h + row * (2 * n_hidden) + o_f[None, :]
    gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_gate + n_hidden, mask=mask, other=0.0).to(tl.float32)
    a = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(p_a + row * n_hidden + o_f[None, :], a.to(p_a.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(p_q, p_h, p_w, p_dh, p_wa, p_dw, n_rows, n_hidden, BR: tl.constexpr, BF: tl.constexpr):
    """dh, w a and dw of BR rows per program, which walks along F so that dw needs no second pass."""
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


def _forward_triton(h: Tensor) -> Tensor:
    n_rows, hidden = h.shape[0], h.shape[1] // 2
    a = h.new_empty(n_rows, hidden)
    if a.numel():
        rows, cols = SWIGLU_BLOCK
        with on_device_of(h):
            swiglu_kernel[(triton.cdiv(n_rows, rows), triton.cdiv(hidden, cols))](
                h, a, n_rows, hidden, BR=rows, BF=cols, num_warps=SWIGLU_WARPS
            )
    return a


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


def swiglu_forward(h: Tensor, backend: str) -> Tensor:
    """a (R, F) of contiguous h (R, 2F)."""
    return _forward_triton(h) if backend == "triton" else _forward_torch(h)


def swiglu_backward(q: Tensor, h: Tensor, w: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dh (R, 2F), w a (R, F), dw (R,) fp32) of contiguous q (R, F), h (R, 2F) and fp32 w (R,)."""
    return _backward_triton(q, h, w) if backend == "triton" else _backward_torch(q, h, w)
