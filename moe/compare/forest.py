"""The ratios of the page as a forest plot: one row a cost, the interval on a logarithmic scale around 1."""

import math
from html import escape

from moe.compare.equal_loss import AXES, Ratio
from moe.compare.result import Result
from moe.compare.sentences import span_text

__all__ = ["section"]

_MARGIN = 1.15  # room beside the outermost end, as a factor


def section(comparison: Result) -> str:
    """The ratios of every run that has one; nothing without a baseline that reached the loss."""
    rows = [(axis, ratio) for entry in comparison.entries for axis, ratio in entry.ratios.items()]
    if not rows:
        return ""
    ends = [end for _, ratio in rows for end in (ratio.span.low, ratio.span.value, ratio.span.high) if end]
    limit = max(max(end, 1 / end) for end in ends) * _MARGIN
    several = len({ratio.run for _, ratio in rows}) > 1
    body = "".join(_row(axis, ratio, limit, several) for axis, ratio in rows)
    name = "the run" if several else escape(comparison.entries[0].run.name)
    scale = f"<span>← baseline cheaper</span><span>equal</span><span>{name} cheaper →</span>"
    return f"""<section>
<h2>The baseline's cost over the run's</h2>
<p class="hint">To reach {comparison.at_loss:.4g} {comparison.unit}. Right of the line, the run was the cheaper one;
bars are intervals, on a logarithmic scale.</p>
<div class="card ratios">{body}
<div class="ends"><span></span><div>{scale}</div></div></div>
</section>"""


def _row(axis: str, ratio: Ratio, limit: float, several: bool) -> str:
    span = ratio.span
    low = _place(span.low, limit) if span.low > 0 else 0.0
    high = _place(span.high, limit) if span.high is not None else 100.0
    fade = (" fades-low" if span.low <= 0 else "") + (" fades-high" if span.high is None else "")
    against = (f"{escape(ratio.run)} " if several else "") + f"against {escape(ratio.baseline)}"
    interval = span_text(span.low, span.high)
    label = f"{AXES[axis]}: {span.value:.2f}, interval {interval}"
    return (
        f'<div class="ratio"><div><h3>{AXES[axis].capitalize()}</h3><span class="against">{against}</span></div>'
        f'<div class="track" role="img" aria-label="{label}"><i class="one" style="left:50%"></i>'
        f'<i class="reach{fade}" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
        f'<i class="dot" style="left:{_place(span.value, limit):.2f}%"></i></div>'
        f'<div class="value">{span.value:.2f}&times;<small>{interval}</small></div></div>'
    )


def _place(value: float, limit: float) -> float:
    """Percent from the left of a track that runs from 1/limit to limit."""
    return 50 + 50 * math.log(value) / math.log(limit)
