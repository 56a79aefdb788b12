"""The comparison in a terminal: one row a run, and under each cost the baseline's cost over the run's."""

from rich import box
from rich.table import Table
from rich.text import Text

from moe.compare.equal_loss import AXES, Span, scores
from moe.compare.result import Entry, Result
from moe.compare.sentences import number

__all__ = ["HEADINGS", "build_table", "cost", "facts"]

HEADINGS = ("parameters", "active", "last loss")
"""Columns between the run's name and its costs."""


def build_table(comparison: Result) -> Table:
    """One row a run: parameters, last evaluation, cost to the equal loss; below, the ratios. Names are never markup."""
    title = Text(f"Cost to reach {comparison.at_loss:.4g} {comparison.unit}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=14)
    for heading in ("params", "active", "last\nloss", *(AXES[axis] for axis in comparison.axes)):
        table.add_column(heading.replace("-", "-\n"), justify="right", no_wrap=True)
    for entry in comparison.entries:
        name = Text(entry.run.name)
        if entry.role == "baseline":
            name.append("\nbaseline", style="dim")
        spans = [entry.crossing.costs.get(axis) for axis in comparison.axes]
        costs = [
            "never" if span is None else cost(axis, span.value)
            for axis, span in zip(comparison.axes, spans, strict=True)
        ]
        table.add_row(name, *map(Text, (*facts(comparison, entry), *costs)))
    compared = [entry for entry in comparison.entries if entry.ratios]
    if compared:
        table.add_section()
    for entry in compared:
        ratios = [entry.ratios.get(axis) for axis in comparison.axes]
        cells = ["" if ratio is None else f"{ratio.span.value:.2f}\n{_interval(ratio.span)}" for ratio in ratios]
        below = "run" if len(compared) == 1 else entry.run.name
        table.add_row(Text(f"baseline / {below}"), *[""] * len(HEADINGS), *map(Text, cells))
    return table


def facts(comparison: Result, entry: Entry) -> list[str]:
    """Cells of one run under `HEADINGS`."""
    run = entry.run
    last = scores(run, comparison.unit)[-1][0]
    return [number(run.parameters_total), number(run.parameters_active), f"{last:.4g}"]


def cost(axis: str, value: float) -> str:
    """A cost with its unit; energy in J, Wh or kWh, whichever reads best."""
    if axis != "energy":
        return number(value)
    if value < 3600:
        return f"{value:.3g} J"
    return f"{value / 3600:.3g} Wh" if value < 3.6e6 else f"{value / 3.6e6:.3g} kWh"


def _interval(span: Span) -> str:
    """As narrow as a column: `1.24-1.67`, `>0.83` when its upper end is open."""
    if span.high is None:
        return f">{span.low:.2f}"
    return f"{span.low:.2f}-{span.high:.2f}" if span.low > 0 else f"<{span.high:.2f}"
