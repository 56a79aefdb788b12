"""Draw docs/results/meter-accuracy.svg from the lines of `scripts/bench meter-accuracy --peers PYTHON`.

plot_meter_accuracy.py LINES. Left: our meter on counters of gain 1, against its goals. Right: the tools' median errors
on the same windows. Both axes are logarithmic.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "docs" / "results" / "meter-accuracy.svg"
GROUP = "counter, gain 1"
GOALS = ((10, 60, 0.5), (60, 100, 0.1))  # from and to seconds, percent
OURS, ZEUS, CODECARBON, GOAL = "#0072b2", "#d55e00", "#009e73", "#555555"
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 260, 60, 48, 80  # of a panel, and around it
SECONDS, PERCENT = (0.5, 1, 2, 5, 10, 30, 60, 100), (0.001, 0.01, 0.1, 1, 10)

Point = tuple[float, float]


def curves(lines: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """(seconds, percent) by the name of a curve; `TOOL` is a tool's median among the others'."""
    found: dict[str, list[Point]] = {}
    for line in lines:
        group, _, rest = line["case"].partition("/")
        length_s = line["config"]["length_s"]
        if group != GROUP or length_s is None:
            continue
        if "/" in rest:
            found.setdefault(line["peer_name"], []).append((length_s, 100 * line["peer"]))
            ours = found.setdefault("our meter", [])
            if (length_s, 100 * line["ours"]) not in ours:  # it is told beside each peer
                ours.append((length_s, 100 * line["ours"]))
        else:
            for name in ("median", "max"):
                found.setdefault(name, []).append((length_s, 100 * line["config"][f"error_{name}"]))
    return found


def _panel(left: float, title: str, drawn: Sequence[tuple[str, list[Point], str, str]]) -> str:
    """One set of axes; each curve has a name for the legend below, a colour and dashes."""

    def place(x: float, y: float) -> Point:
        share_x = math.log(x / SECONDS[0]) / math.log(SECONDS[-1] / SECONDS[0])
        share_y = math.log(max(y, PERCENT[0]) / PERCENT[0]) / math.log(PERCENT[-1] / PERCENT[0])
        return left + WIDTH * share_x, TOP + HEIGHT * (1 - share_y)

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{title}</text>']
    for tick in PERCENT:
        _, y = place(1, tick)
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    for tick in SECONDS:
        x, y = place(tick, PERCENT[0])
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    for place_in_legend, (name, points, colour, dashes) in enumerate(drawn):
        spots = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        x, y = left + 125 * place_in_legend, TOP + HEIGHT + 40
        style = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}" fill="none"'
        parts.append(f'<polyline points="{spots}" {style}/>\n<path d="M{x} {y}h24" {style}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{name}</text>')
    return "\n".join(parts)


def picture(lines: Sequence[dict[str, Any]]) -> str:
    """Both panels over the length of the window."""
    found = curves(lines)
    goals = [(x, goal) for start, end, goal in GOALS for x in (start, end)]
    ours = [("median", found["median"], OURS, ""), ("largest", found["max"], OURS, "6 3"), ("goal", goals, GOAL, "2 3")]
    tools = [("our meter", found["our meter"], OURS, "")]
    for name, colour, dashes in (("zeus", ZEUS, ""), ("codecarbon", CODECARBON, "6 3")):
        tools += [(peer, points, colour, dashes) for peer, points in found.items() if peer.startswith(name)]
    right = LEFT + WIDTH + GAP
    width, height = right + WIDTH + 20, TOP + HEIGHT + 84
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{_panel(LEFT, 'our meter on a counter with gain 1: error', ours)}\n"
        f"{_panel(right, 'median error of three tools, the same windows', tools)}\n"
        f'<text x="{width - 20}" y="{height - 14}" text-anchor="end">length of the window, seconds</text>\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("lines", type=Path, help="what the benchmark printed")
    lines = [json.loads(line) for line in parser.parse_args().lines.read_text().splitlines()]
    TARGET.write_text(picture(lines))


if __name__ == "__main__":
    main()
