"""scripts/kernel_table: the page it writes, and what it counts."""

import sys
from pathlib import Path

import pytest

from moe_kernels._triton import HAVE_TRITON, INTERPRETED

if not HAVE_TRITON or INTERPRETED:
    pytest.skip("runs on Linux in the process of scripts/test that compiles: pytest -m aot", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

import kernel_table
from kernel_cases import GPU
from kernel_launches import Glue, Launch, record
from kernel_work import WORK

pytestmark = pytest.mark.aot


def test_page_has_a_line_for_each_kernel(tmp_path: Path) -> None:
    """Sorting's kernels, on each of three architectures, with registers and occupancy; what is predicted says so."""
    page = tmp_path / "page.md"
    kernel_table.main(["--work", "sort", "--out", str(page)])
    text = page.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "| sm_" in line]
    launched = {step.name for step in record(WORK["sort"], 90) if isinstance(step, Launch)}
    assert {(row[0], row[2]) for row in rows} == {(k, f"sm_{arch}") for k in launched for arch in (80, 90, 100)}
    assert all(0 < int(row[3]) < 256 and 0 < float(row[7]) <= 1 for row in rows)
    assert "Nothing on this page was measured" in text


def test_operations_of_a_layer_add_up() -> None:
    """The products of the recorded launches are 6 T K D F operations forward and 18 with the backward pass."""
    case = GPU["qwen3-30b"]
    for work, times in (("qwen3-30b/inference", 1), ("qwen3-30b", 3)):
        steps = [step for step in record(WORK[work], 90) if isinstance(step, Launch)]
        products = [step for step in steps if any(t.dim() == 3 for t in step.tensors.values())]
        counted = sum(kernel_table.product_flops(step, case.rows) for step in products)
        assert counted == times * case.forward_flops


def test_master_weights_are_cast_once_a_pass() -> None:
    """6 bytes a parameter forward and again backward, and gradients in fp32; weights of bf16 are not touched."""
    case = GPU["qwen3-30b"]
    parameters = 3 * case.experts * case.model * case.hidden
    for work, passes in (("qwen3-30b-masters/inference", 1), ("qwen3-30b-masters", 2), ("qwen3-30b", 0)):
        casts = [step.bytes_moved for step in record(WORK[work], 90) if isinstance(step, Glue) and step.name == "to"]
        assert sum(size for size in casts if size > 2**20) == passes * 6 * parameters


def test_prediction_takes_the_longer_of_two() -> None:
    """Bytes alone: 85 % of 4.3 TB/s and a launch of 3 us."""
    step = kernel_table.predict(Glue("index_select", 3_655_000_000), rows=1, unit="")
    assert step.seconds == pytest.approx(1e-3 + 3e-6)
