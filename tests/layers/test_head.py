"""The output head's chunked loss: value and gradients of plain cross-entropy, in bounded memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.layers import head as head_file
from moe.layers.head import OutputHead, next_token_labels


def _plain(head: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head.weight).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("labelled", ["all", "some", "none", "one"])
def test_equals_plain_cross_entropy(chunk_rows: int, labelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64: the sum of losses and both gradients, whatever the chunks, their softmaxes and the ignored labels."""
    monkeypatch.setattr(head_file, "_CPU_ROWS", chunk_rows)
    monkeypatch.setattr(head_file, "_CPU_LOGITS", 3 * 23)
    torch.manual_seed(0)
    head = OutputHead(5, 23).double()
    hidden = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(23, (3, 6))
    keep = {"all": 1.0, "some": 0.5, "none": 0.0, "one": 0.0}[labelled]
    labels[torch.rand(3, 6) >= keep] = -100
    if labelled == "one":
        labels[1, 2] = 22
    found, wanted = head(hidden, labels), _plain(head, hidden, labels)
    torch.testing.assert_close(found, wanted.float())
    mine = torch.autograd.grad(found * 0.3, (hidden, head.weight))
    theirs = torch.autograd.grad(wanted * 0.3, (hidden, head.weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # the losses' sum, and so its gradient, is fp32


def test_large_logits_stay_finite() -> None:
    """exp(1000) would overflow; the loss is then the distance to the largest logit."""
    head = OutputHead(1, 3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1000.0], [0.0], [-1000.0]]))
    hidden = torch.ones(2, 1, requires_grad=True)
    loss = head(hidden, torch.tensor([2, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(2000.0)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_autocast_sums_the_weight_gradient_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 products, fp32 gradient: chunks that are rounded one by one do not round their sum."""
    torch.manual_seed(0)
    head = OutputHead(16, 50)
    hidden = torch.randn(512, 16, requires_grad=True)
    labels = torch.randint(50, (512,))
    exact = torch.autograd.grad(_plain(head, hidden, labels), head.weight)[0]
    monkeypatch.setattr(head_file, "_CPU_ROWS", 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, labels)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, head.weight)[0]
    assert found.dtype == torch.float32
    # a term's relative rounding error is 2^-8 in each factor, and errors of 512 terms add up like a random walk
    assert (found - exact).norm() / exact.norm() < 2**-8


def test_a_bf16_weights_gradient_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks are as exact as one."""
    torch.manual_seed(0)
    head = OutputHead(16, 50).to(torch.bfloat16)
    hidden, labels = torch.randn(512, 16, dtype=torch.bfloat16), torch.randint(50, (512,))
    exact = torch.autograd.grad(_plain(head.double(), hidden.double(), labels), head.weight)[0]
    head.to(torch.bfloat16)
    errors = []
    for rows in (512, 8):
        monkeypatch.setattr(head_file, "_CPU_ROWS", rows)
        found = torch.autograd.grad(head(hidden, labels), head.weight)[0]
        assert found.dtype == torch.bfloat16
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]


def test_a_label_that_is_no_word_is_not_trained_as_one() -> None:
    """-1 is not -100: an error, as from torch's cross-entropy."""
    with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
        OutputHead(4, 9)(torch.randn(2, 4), torch.tensor([3, -1]))


def test_only_what_needs_a_gradient_gets_one() -> None:
    """A frozen head or frozen states; and no gradient work at all without gradients."""
    head, labels = OutputHead(4, 9), torch.randint(9, (6,))
    hidden = torch.randn(6, 4, requires_grad=True)
    head.weight.requires_grad_(False)
    head(hidden, labels).backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    head.weight.requires_grad_(True)
    head(hidden.detach(), labels).backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert not head(hidden, labels).requires_grad


def test_the_library_op_is_sound() -> None:
    """torch's own checks of schema, fake tensors, autograd registration and tracing with dynamic shapes."""
    arguments = (torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), torch.arange(4))
    torch.library.opcheck(torch.ops.moe.linear_cross_entropy.default, (*arguments, True, True))


def test_labels_move_left() -> None:
    """Position s is scored against the next label; the last against none."""
    assert next_token_labels(torch.tensor([[5, 6, -100, 8]])).tolist() == [[6, -100, 8, -100]]


_PEAK = """
import resource, sys, torch
from moe.layers.head import OutputHead
torch.set_num_threads(2)
rows, words, width = map(int, sys.argv[1:])
head = OutputHead(width, words)
hidden = torch.randn(rows, width, requires_grad=True)
labels = torch.randint(words, (rows,))
head(hidden[:64], labels[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
head(hidden, labels).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _peak_gb(rows: int, words: int, width: int) -> float:
    """What a loss with gradients adds to a fresh process's largest memory, in GB."""
    words_ = [sys.executable, "-c", _PEAK, str(rows), str(words), str(width)]
    done = subprocess.run(words_, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e9


def test_memory_does_not_grow_with_the_rows() -> None:
    """16k tokens of 32k words: 2.1 GB of logits, 34 MB at a time, a few such at once."""
    assert _peak_gb(16_384, 32_768, 16) < 0.3


@pytest.mark.soak
def test_memory_at_size() -> None:
    """32k tokens of DeepSeek-V3's vocabulary: 17 GB of logits never exist."""
    assert _peak_gb(32_768, 129_280, 64) < 0.7
