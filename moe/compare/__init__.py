"""Runs at equal loss: what each paid to reach the same evaluation loss, as JSON, terminal table and HTML page.

    from moe.compare import compare

    comparison = compare(["runs/moe"], baselines=["runs/dense_s", "runs/dense_m"])
    print(comparison.to_json()["ratios"]["device_hours"])
    comparison.write_html("comparison.html")

Computed from run directories alone, offline, again and again. Needs neither torch nor a GPU.
"""

from moe.compare.comparison import Comparison, compare
from moe.compare.equal_loss import Crossing, Ratio, Span
from moe.compare.result import Entry
from moe.compare.runs import EvalPoint, Run, load_run

__all__ = ["Comparison", "Crossing", "Entry", "EvalPoint", "Ratio", "Run", "Span", "compare", "load_run"]
