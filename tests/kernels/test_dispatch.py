"""sort_by_expert against Python's stable sort: integers, so equality."""

from typing import Any

import pytest
import torch

from moe_kernels import KernelError, dispatch, sort_by_expert


@pytest.mark.parametrize("counted", [False, True], ids=["counts", "counts-given"])
@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "top_k"),
    [(1, 1, 1), (7, 5, 2), (63, 24, 6), (200, 3, 1), (40, 33, 8), (9, 512, 8), (0, 4, 2)],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_a_stable_sort(place: Any, n_tokens: int, n_experts: int, top_k: int, counted: bool) -> None:
    """Rows of an expert stay in token order; expert 0 is left empty where there is another."""
    low = 1 if n_experts > 1 else 0
    index = torch.randint(low, n_experts, (n_tokens, top_k), device=place.device)
    flat = index.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda row: flat[row])
    counts = torch.bincount(index.flatten(), minlength=n_experts).int()
    out = sort_by_expert(index, n_experts, tokens_per_expert=counts if counted else None, backend=place.backend)
    assert out.order_R.tolist() == order
    assert out.token_R.tolist() == [row // top_k for row in order]
    assert [order[place] for place in out.place_R.tolist()] == list(range(len(order)))
    assert out.offsets_E1.tolist() == [0, *counts.cumsum(0).tolist()]
    assert (out.order_R.dtype, out.offsets_E1.dtype) == (torch.int32, torch.int32)


def test_all_tokens_on_one_expert(place: Any) -> None:
    """Nothing moves, across several blocks of the kernel."""
    out = sort_by_expert(torch.full((150, 2), 4, device=place.device), 6, backend=place.backend)
    assert out.order_R.tolist() == list(range(300))
    assert out.offsets_E1.tolist() == [0, 0, 0, 0, 0, 300, 300]


@pytest.mark.parametrize("counted", [False, True], ids=["counts", "counts-given"])
def test_skewed_rows_over_many_tiles(place: Any, counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zipf's law over experts: as many rows of one as fit several blocks, and a scan of several tiles each way."""
    monkeypatch.setattr(dispatch, "SCAN_TILE", (2, 8))
    zipf = 1 / torch.arange(1, 10)
    index = torch.multinomial(zipf, 300, replacement=True).view(100, 3).to(place.device)
    counts = torch.bincount(index.flatten(), minlength=11) if counted else None
    out = sort_by_expert(index, 11, tokens_per_expert=counts, backend=place.backend)
    flat = index.flatten().tolist()
    assert flat.count(0) > 80
    assert out.order_R.tolist() == sorted(range(300), key=lambda row: flat[row])
    assert out.offsets_E1.tolist() == [sum(e < bound for e in flat) for bound in range(12)]


@pytest.mark.interpreter
def test_scan_worked_example() -> None:
    """The numbers in the scan's docstring: three blocks of two rows, two experts."""
    hist = torch.tensor([[1, 1], [0, 2], [1, 0]], dtype=torch.int32)
    counts, offsets = hist.sum(0), torch.empty(3, dtype=torch.int32)
    dispatch.scan_histogram_kernel[(2,)](hist, counts, offsets, 3, 2, BN=2, BC=2, BE=4)
    assert hist.tolist() == [[0, 2], [1, 3], [1, 5]]
    assert offsets.tolist() == [0, 2, 5]


def test_worked_examples(place: Any) -> None:
    """The numbers in the docstrings of the file and of the scatter kernel, for 64 and 32 bit indices."""
    index = torch.tensor([[2, 0], [0, 2]], device=place.device)
    for given in (index, index.int(), index.t()):
        out = sort_by_expert(given, 3, backend=place.backend)
        assert out.order_R.tolist() == [1, 2, 0, 3]
        assert out.token_R.tolist() == [0, 1, 0, 1]
        assert out.place_R.tolist() == [2, 0, 1, 3]
        assert out.offsets_E1.tolist() == [0, 2, 2, 4]


def test_one_dimension_is_refused(on_cpu: Any) -> None:
    """The number of slots per token cannot be guessed."""
    with pytest.raises(KernelError, match="topk_index_TK has 1 dimensions"):
        sort_by_expert(torch.zeros(4, dtype=torch.int64), 3, backend=on_cpu.backend)


def test_library_op_is_well_formed() -> None:
    """Schema and fake implementation agree; one node for torch.compile."""
    index = torch.randint(0, 5, (6, 2))
    torch.library.opcheck(torch.ops.moe_kernels.sort_by_expert.default, (index, 5, None, "torch"))
    compiled = torch.compile(lambda i: sort_by_expert(i, 5), fullgraph=True, backend="aot_eager")
    for want, got in zip(sort_by_expert(index, 5), compiled(index), strict=True):
        assert torch.equal(want, got)
