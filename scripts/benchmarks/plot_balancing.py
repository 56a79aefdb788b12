"""Put the balancing methods' runs side by side: docs/results/balancing.json and .svg, from the runs' own files.

plot_balancing.py RUNS reads RUNS/METHOD_SEED/metrics.jsonl and config.json. The numbers are each run's last evaluation;
the curves are means over WINDOW training steps, thin for a seed and thick for the mean over seeds.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "docs" / "results"
COLOURS = {"sign": "#0072b2", "quantile": "#d55e00", "aux_loss": "#009e73", "none": "#555555"}
WINDOW, THINNING = 20, 5
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 260, 60, 48, 80  # of a panel, and around it


@dataclass(frozen=True)
class Run:
    """One finished run: its settings, its last evaluation and its training rows."""

    method: str
    seed: int
    balance: dict[str, Any]
    evaluation: dict[str, float]
    rows: list[dict[str, float]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluation = [row for row in rows if "eval/loss" in row][-1]
        if evaluation["train/step"] != config["train"]["max_steps"]:
            raise SystemExit(f"{folder} stopped at step {evaluation['train/step']}: finish it first")
        balance = config["balance"]
        training = [row for row in rows if "train/loss" in row]
        return cls(balance["method"], config["run"]["seed"], balance, evaluation, training)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(tokens, mean of the metric over the last WINDOW steps), thinned out."""
        return [
            (self.rows[end - 1]["train/tokens"], statistics.fmean(row[metric] for row in self.rows[end - WINDOW : end]))
            for end in range(WINDOW, len(self.rows) + 1, THINNING)
        ]


def numbers(runs: Sequence[Run]) -> dict[str, Any]:
    """What the table shows: every run's last evaluation, and means over seeds."""
    methods: dict[str, Any] = {}
    for method in COLOURS:
        mine = [run for run in runs if run.method == method]
        if not mine:
            continue
        shown = ("eval/loss", "eval/loss_se", "eval/max_vio")
        methods[method] = {
            "balance": mine[0].balance,
            "seeds": {str(run.seed): {name: run.evaluation[name] for name in shown} for run in mine},
            "mean": {name: statistics.fmean(run.evaluation[name] for run in mine) for name in shown[::2]},
        }
    return methods


def _mean(curves: Sequence[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return [(points[0][0], statistics.fmean(y for _, y in points)) for points in zip(*curves, strict=True)]


def _panel(
    runs: Sequence[Run], metric: str, title: str, left: float, ticks: Sequence[float], scale: Callable[[float], float]
) -> str:
    """One set of axes; `scale` makes the y axis even (log or not), and the first and last tick are its ends."""
    reach = max(run.rows[-1]["train/tokens"] for run in runs)
    low, high = scale(ticks[0]), scale(ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (scale(min(max(y, ticks[0]), ticks[-1])) - low) / (high - low)
        return left + WIDTH * x / reach, TOP + HEIGHT * (1 - share)

    def line(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float) -> str:
        spots = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        return f'<polyline points="{spots}" stroke="{colour}" stroke-width="{width}" opacity="{opacity}" fill="none"/>'

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{title}</text>']
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tokens in range(0, int(reach) + 1, 200_000):
        x, y = place(tokens, ticks[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tokens:,}</text>')
    for method, colour in COLOURS.items():
        curves = [run.curve(metric) for run in runs if run.method == method]
        parts += [line(points, colour, 0.8, 0.45) for points in curves]
        if curves:
            parts.append(line(_mean(curves), colour, 2.2, 1))
    return "\n".join(parts)


def picture(runs: Sequence[Run]) -> str:
    """Two panels over tokens: load violation on a log axis, and training loss."""
    right = LEFT + WIDTH + GAP
    width, height = right + WIDTH + 20, TOP + HEIGHT + 60
    shown = [method for method in COLOURS if any(run.method == method for run in runs)]
    legend = "".join(
        f'<text x="{LEFT + 110 * place}" y="{height - 14}" fill="{COLOURS[method]}" font-weight="bold">{method}</text>'
        for place, method in enumerate(shown)
    )
    violation = _panel(runs, "router/max_vio", "router/max_vio, worst layer", LEFT, (0.25, 0.5, 1, 2, 4, 8), math.log)
    loss = _panel(runs, "train/loss", "train/loss, nats", right, (3.5, 4, 4.5, 5, 5.5, 6, 6.5), lambda y: y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f'{violation}\n{loss}\n{legend}\n<text x="{width - 20}" y="{height - 14}" text-anchor="end">'
        f"training tokens; means over {WINDOW} steps; thin: one seed</text>\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="folder that holds METHOD_SEED folders")
    folder: Path = parser.parse_args().runs
    paths = sorted(path for method in COLOURS for path in folder.glob(f"{method}_[0-9]*"))
    if not paths:
        raise SystemExit(f"{folder} holds no run named METHOD_SEED")
    runs = [Run.read(path) for path in paths]
    TARGET.mkdir(exist_ok=True)
    (TARGET / "balancing.json").write_text(json.dumps(numbers(runs), indent=2) + "\n")
    (TARGET / "balancing.svg").write_text(picture(runs))


if __name__ == "__main__":
    main()
