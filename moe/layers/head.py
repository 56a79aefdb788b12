"""The output head: hidden states to logits, or straight to their cross-entropy without keeping the logits.

    l = h W^T                                  (N, V) fp32
    loss = sum over labelled rows of  logsumexp(l_n) - l_n[label_n]
    dl_n = softmax(l_n) - onehot(label_n)      dh = dl W,  dW = dl^T h

32,768 tokens of a 129,280-word vocabulary have 17 GB of fp32 logits, and their gradient as much again. Rows are
therefore taken some hundred or thousand at a time, and both gradients are worked out while a chunk's logits are there:
no product is computed twice, and what lives on is h's and W's own gradient. torch's `linear_cross_entropy` (from 2.13)
does the same but breaks a torch.compile graph, and Liger's needs a GPU; hence an op of our own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layers.precision import as_multiplied

__all__ = ["IGNORED", "OutputHead", "next_token_labels"]

IGNORED = -100  # the label of a position without a loss, as in torch and Hugging Face
_CHUNK_LOGITS = 2**27  # half a GB in fp32: some thousand rows of a large vocabulary keep a GPU's matrix units busy
_CPU_ROWS = 512  # of a CPU's products: fewer make them slow, and the weight's gradient is read and written more often
_CPU_LOGITS = 2**17  # a CPU takes the softmax of so many at a time, in its cache


class OutputHead(nn.Linear):
    """`head(hidden)` are logits (…, V); `head(hidden, labels)` is the summed cross-entropy, fp32, in bounded memory.

    `next_token_labels` of this file shifts labels for next-token prediction. Divide by the number of labelled positions
    for the mean.

    Args:
        hidden_size: width D of the input.
        vocab_size: classes V.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits of `hidden` (…, D), in its dtype; or with `labels` (…), integers, the sum of -log p(label) in nats.

        Labels belong to the positions they stand at (they are not shifted here); -100 has no loss. Gradients are worked
        out in the forward pass, when any are wanted, and can be had once: no second derivatives. Under autocast the
        products are in the autocast dtype, and gradients of fp32 weights are summed up in fp32.
        """
        if labels is None:
            return super().forward(hidden)
        hidden = as_multiplied(hidden)
        grad = torch.is_grad_enabled()
        return _linear_cross_entropy(
            hidden.flatten(0, -2),
            self.weight,
            labels.flatten(),
            grad and hidden.requires_grad,
            grad and self.weight.requires_grad,
        )[0]


def next_token_labels(labels: Tensor) -> Tensor:
    """Labels (B, S) moved one position to the left: position s is scored against label s + 1, the last against none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


@torch.library.custom_op("moe::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, its gradient by hidden, by weight); gradients that are not needed are empty."""
    on_cpu = hidden.device.type == "cpu"
    rows = _CPU_ROWS if on_cpu else max(1, _CHUNK_LOGITS // weight.shape[0])
    few = max(torch.get_num_threads(), _CPU_LOGITS // weight.shape[0]) if on_cpu else rows
    matrix = weight.to(hidden.dtype)
    total = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    # chunks add up in fp32 even where the weight is bf16
    summed = torch.promote_types(weight.dtype, torch.float32)
    d_weight = torch.zeros(weight.shape if need_weight else 0, dtype=summed, device=weight.device)
    for first in range(0, hidden.shape[0], rows):
        chunk, label = hidden[first : first + rows], labels[first : first + rows]
        logits = chunk @ matrix.t()
        scored = (label != IGNORED).unsqueeze(1)
        target = torch.where(scored, label.unsqueeze(1), 0)
        found = []  # log-probabilities of the targets
        for some, at in zip(logits.split(few), target.split(few), strict=True):
            log_p = F.log_softmax(some, 1, dtype=torch.float32)
            found.append(log_p.gather(1, at))
            if need_hidden or need_weight:  # logits become their gradient, of positions without a loss too
                some.copy_(log_p.exp_().scatter_(1, at, found[-1].expm1()))  # p, and p - 1 for the target
            del log_p
        total -= torch.where(scored, torch.cat(found), 0.0).sum()
        if need_hidden:
            torch.mm(logits, matrix, out=d_hidden[first : first + rows]).mul_(scored)
        if need_weight and d_weight.dtype == hidden.dtype:
            d_weight.addmm_(logits.t(), chunk * scored)
        elif need_weight:
            d_weight += logits.t() @ (chunk * scored)
        del logits  # before the next chunk's are made
    return total, d_hidden, d_weight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, d_weight)


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 5
    d_hidden, d_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return (
        d_hidden * grad if need_hidden else None,
        d_weight * grad if need_weight else None,
        *(None,) * 3,
    )


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
