"""The comparison as one self-contained page: charts, table, facts of each run, notes. It opens nothing over a network.

Whatever comes from run files is escaped here, where it enters the page; data for the script is JSON in which `<`
cannot appear, so that no text can end its element. A content security policy forbids everything from elsewhere.
"""

import json
import os
import re
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from moe.compare import facts, forest, sentences, table
from moe.compare.charts import SERIES, figures
from moe.compare.equal_loss import AXES, METHOD, Span
from moe.compare.result import Result
from moe.compare.style import SCRIPT, STYLE
from moe.errors import CompareError

__all__ = ["page", "write_html"]

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_html(comparison: Result, path: Path) -> None:
    """Write the page beside `path` and rename it. Raises CompareError when the folder cannot be written."""
    if not path.name or path.is_dir():
        raise CompareError(f"--html {path} is a folder; give the file to write, such as report.html")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(page(comparison), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise CompareError(f"--html {path} cannot be written ({error.strerror}); choose another file") from None
    finally:
        with suppress(OSError):
            aside.unlink()  # there only when writing or renaming failed


def page(comparison: Result) -> str:
    """The whole page, Plotly included (about 5 MB)."""
    from plotly.offline import get_plotlyjs

    title = f"Cost to reach {comparison.at_loss:.4g} {comparison.unit}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">Frugal MoE: runs at equal loss</p>
<h1>{escape(_headline(comparison))}</h1>
<p class="lede">{escape(_lede(comparison))}</p>
</header>
{forest.section(comparison)}
{_charts(comparison)}
{_table(comparison)}
{_notes(comparison)}
{facts.section(comparison)}
<footer>Computed from the run directories alone.</footer>
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{_script_json(figures(comparison))}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _headline(comparison: Result) -> str:
    ratio = comparison.ratios.get("device_hours")
    at = f"{comparison.at_loss:.4g} {comparison.unit}"
    if ratio is None:
        return f"What it cost to reach {at}"
    winner, loser, span = sentences.cheaper(ratio)
    if sentences.includes_one(span):
        return f"{winner} and {loser} cannot be told apart by their device-hours to {at}"
    return f"{winner} reached {at} with {span.value:.2f}x the device-hours of {loser}"


def _lede(comparison: Result) -> str:
    said = "Everything each run spent counts: idle time, evaluation, checkpoints, and work a restart threw away."
    ratio = comparison.ratios.get("device_hours")
    if ratio is None:
        return said
    winner, loser, span = sentences.cheaper(ratio)
    runs = "one run" if ratio.n == 1 else f"{ratio.n} runs"
    share = f"{winner} took {span.value:.2f}x the device-hours of {loser}" if sentences.includes_one(span) else ""
    interval = f"interval {sentences.span_text(span.low, span.high)}, {runs} a side"
    return f"{share}, {interval}. {said}" if share else f"{interval.capitalize()}. {said}"


def _charts(comparison: Result) -> str:
    legend = []
    for index, entry in enumerate(comparison.entries):
        dash = "" if entry.role == "run" else ' stroke-dasharray="5 3"'
        line = f'<line x1="0" y1="5" x2="26" y2="5" stroke="var(--s{index % SERIES})" stroke-width="3"{dash}/>'
        key = f'<svg width="26" height="10" aria-hidden="true">{line}</svg>'
        legend.append(f"<li>{key}{escape(entry.run.name)} ({entry.role})</li>")
    plots = [
        f'<figure class="card chart"><figcaption>Loss against {name}</figcaption>'
        f'<div class="plot" id="{axis}-plot" role="img" aria-label="Evaluation loss of each run against its {name}; '
        'the table below holds the same costs"></div></figure>'
        for axis, name in ((axis, AXES[axis]) for axis in comparison.axes)
    ]
    return f"""<section>
<h2>Evaluation loss against cost</h2>
<p class="hint">Diamonds mark where each run first reached the loss, with its interval. Shaded: 1.96 standard errors of
the evaluation. Drag to zoom, double-click to go back.</p>
<div class="bar"><ul class="legend">{"".join(legend)}</ul>
<fieldset aria-label="Scale of the cost axes">
<label><input type="radio" name="scale" value="linear" checked>Linear</label>
<label><input type="radio" name="scale" value="log">Logarithmic</label>
</fieldset></div>
<noscript><p>The charts need JavaScript; the table holds the same costs.</p></noscript>
<div class="charts">{"".join(plots)}</div>
</section>"""


def _table(comparison: Result) -> str:
    headings = ("run", "role", *table.HEADINGS, *(AXES[axis] for axis in comparison.axes))
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = []
    for entry in comparison.entries:
        cells = [entry.role, *table.facts(comparison, entry)]
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        values += "".join(f"<td>{_cost(axis, entry.crossing.costs.get(axis))}</td>" for axis in comparison.axes)
        body.append(f'<tr><th scope="row">{escape(entry.run.name)}</th>{values}</tr>')
    return f"""<section>
<h2>Cost to reach {comparison.at_loss:.4g} {comparison.unit}</h2>
<p class="hint">The cost of each run at the loss, with its interval; totals of the whole runs are further down.</p>
<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>
</section>"""


def _cost(axis: str, span: Span | None) -> str:
    if span is None:
        return "not reached"
    high = f"to {table.cost(axis, span.high)}" if span.high is not None else "or more"
    return f"{table.cost(axis, span.value)}<small>{table.cost(axis, span.low)} {high}</small>"


def _notes(comparison: Result) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    said = [METHOD, *(ratio.method for entry in comparison.entries for ratio in entry.ratios.values())]
    method = " ".join(dict.fromkeys(sentence for text in said for sentence in re.split(r"(?<=[.]) ", text)))
    data = escape(json.dumps(comparison.to_json(), indent=2, allow_nan=False))
    return f"""<section>
<h2>What this says, and what it does not</h2>
<ul class="notes">{items}</ul>
<h3>Method</h3>
<p class="hint">{escape(method)}</p>
<details><summary>The comparison as JSON</summary><pre class="card" tabindex="0">{data}</pre></details>
</section>"""


def _script_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
