"""Evaluation loss against each cost, as Plotly figures in plain JSON values.

Colours are written `var(--name)` and filled in on the page from its style sheet, so that a figure follows the reader's
light or dark theme. Plotly reads text as a small markup language: every name is escaped before it gets here.
"""

from html import escape
from typing import Any

from moe.compare.equal_loss import AXES, Span, scores
from moe.compare.result import Entry, Result
from moe.compare.table import cost

__all__ = ["SERIES", "figures"]

SERIES = 6
"""Colours the style sheet has: --s0 … --s5, each with a translucent --s0-soft."""

_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "pentagon", "star")
_SCALES = {
    "tokens": (1.0, "tokens"),
    "device_hours": (1.0, "device-hours"),
    "energy": (1 / 3.6e6, "energy (kWh)"),
}


def figures(comparison: Result) -> list[dict[str, Any]]:
    """One figure per cost axis: `{"axis", "data", "layout"}`."""
    return [_figure(comparison, axis) for axis in comparison.axes]


def _figure(comparison: Result, axis: str) -> dict[str, Any]:
    scale, title = _scale(comparison, axis)
    data: list[dict[str, Any]] = []
    for index, entry in enumerate(comparison.entries):
        data += _traces(comparison, entry, index, axis, scale)
    at_loss = {"y0": comparison.at_loss, "y1": comparison.at_loss, "x0": 0, "x1": 1, "xref": "paper", "type": "line"}
    line = {"color": "var(--muted)", "dash": "dot", "width": 1}
    label = {
        "text": f"{comparison.at_loss:.4g}",
        "xref": "paper",
        "x": 0.01,
        "xanchor": "left",
        "y": comparison.at_loss,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": "var(--muted)"},
    }
    layout = {
        "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": comparison.unit}},
        "shapes": [at_loss | {"line": line}],
        "annotations": [label],
    }
    return {"axis": axis, "data": data, "layout": layout}


def _scale(comparison: Result, axis: str) -> tuple[float, str]:
    """Factor on stored numbers and the axis title; small energies in Wh or J."""
    if axis != "energy":
        return _SCALES[axis]
    most_j = max(entry.run.energy_j or 0.0 for entry in comparison.entries)
    if most_j < 3600:
        return 1.0, "energy (J)"
    return (1 / 3600, "energy (Wh)") if most_j < 3.6e6 else _SCALES[axis]


def _traces(comparison: Result, entry: Entry, index: int, axis: str, scale: float) -> list[dict[str, Any]]:
    run = entry.run
    name = escape(run.name, quote=False).replace("%", "&#37;")  # % would begin a placeholder in a hover text
    colour = f"--s{index % SERIES}"
    pairs = scores(run, comparison.unit)
    stored = {"tokens": "tokens", "device_hours": "device_hours", "energy": "energy_j"}[axis]
    x = [getattr(point, stored) * scale for point in run.curve]
    upper, lower = [y + 1.96 * error for y, error in pairs], [y - 1.96 * error for y, error in pairs]
    band = {
        "x": [*x, *reversed(x)],
        "y": [*upper, *reversed(lower)],
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"var({colour}-soft)",
        "hoverinfo": "skip",
    }
    curve = {
        "x": x,
        "y": [y for y, _ in pairs],
        "name": name,
        "mode": "lines+markers",
        "line": {"color": f"var({colour})", "width": 2, "dash": "solid" if entry.role == "run" else "dash"},
        "marker": {"size": 6, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "color": f"var({colour})"},
        "customdata": [[f"{error:.2g}", cost(axis, value / scale)] for (_, error), value in zip(pairs, x, strict=True)],
        "hovertemplate": "%{y:.4g} ± %{customdata[0]}<br>%{customdata[1]} " + f"{_word(axis)}<extra>{name}</extra>",
    }
    span = entry.crossing.costs.get(axis)
    return [band, curve] if span is None else [band, curve, _marker(comparison, name, colour, axis, scale, span)]


def _marker(comparison: Result, name: str, colour: str, axis: str, scale: float, span: Span) -> dict[str, Any]:
    """The crossing with its interval; an open end is drawn as far as the value and said in words."""
    high = span.value if span.high is None else span.high
    reach = f"{cost(axis, span.low)} to {cost(axis, span.high)}" if span.high is not None else "no upper bound"
    return {
        "x": [span.value * scale],
        "y": [comparison.at_loss],
        "name": name,
        "mode": "markers",
        "marker": {
            "size": 13,
            "symbol": "diamond",
            "color": f"var({colour})",
            "line": {"width": 2, "color": "var(--paper)"},
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [(high - span.value) * scale],
            "arrayminus": [(span.value - span.low) * scale],
            "color": f"var({colour})",
            "thickness": 2,
            "width": 6,
        },
        "hovertemplate": f"reached {comparison.at_loss:.4g} at {cost(axis, span.value)} {_word(axis)}"
        f"<br>{reach}<extra>{name}</extra>",
    }


def _word(axis: str) -> str:
    return "" if axis == "energy" else AXES[axis]
