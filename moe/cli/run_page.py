"""The page of `moe runs show`: one run on one screen."""

import shlex
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moe.compare.runs import printable
from moe.compare.sentences import number
from moe.runs import RunDetails

__all__ = ["page", "sparkline"]

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40


def page(run: RunDetails, *, verified: bool) -> Group:
    """Facts, losses, cost and checkpoints; `verified` says whether checksums were compared, or sizes only."""
    facts = Table.grid(padding=(0, 2))
    for name, words in _facts(run):
        facts.add_row(Text(name), Text(printable(words)))
    parts: list[Any] = [facts]
    if run.checkpoints:
        table = Table("checkpoint", "size", "checksums" if verified else "files and sizes", box=box.SIMPLE_HEAD)
        for checkpoint in run.checkpoints:
            cells = (checkpoint.name, f"{number(checkpoint.size_bytes)}B", checkpoint.fault or "whole")
            table.add_row(*(Text(printable(cell)) for cell in cells))
        parts.append(table)
    return Group(*parts, *(Text(printable(note)) for note in run.cost_notes))


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Means of at most `width` equal parts as bars between the least and the greatest of them."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * part // width for part in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / (high - low or 1) * (len(_BARS) - 1))] for mean in means)


def _facts(run: RunDetails) -> list[tuple[str, str]]:
    status, recipe, train = run.status, run.recipe, run.recipe.train
    kind = f"{recipe.model.n_routed_experts} experts" if recipe.model.is_moe else "dense"
    facts = [
        ("run", f"{status.name}, {status.state}"),
        ("progress", f"step {status.step} of {status.max_steps}, {number(status.tokens)} tokens"),
        (
            "model",
            f"{number(run.parameters_total)} parameters, {number(run.parameters_active)} active, {kind}, "
            f"{recipe.model.num_hidden_layers} layers, {recipe.model.attention} attention",
        ),
        ("data", _data(run)),
        (
            "schedule",
            f"{train.global_batch_size} sequences of {train.seq_len} tokens a step, lr {recipe.optim.lr:g}, "
            f"{train.precision}, balance.method={recipe.balance.method}, seed {recipe.run.seed}",
        ),
    ]
    for name, curve in (("train loss", run.train_losses), ("eval loss", run.eval_losses)):
        if curve:
            values = [loss for _, loss in curve]
            facts.append((name, f"{values[0]:.4f} {sparkline(values)} {values[-1]:.4f}"))
    if run.cost:
        facts += [("energy", _energy(run.cost)), ("device-hours", _hours(run.cost))]
    environment = run.environment
    if environment:
        ranks = environment.get("world_size")
        facts.append(("hardware", f"{environment.get('device_name')}, {ranks} rank{'' if ranks == 1 else 's'}"))
        facts.append(("command", shlex.join(map(str, environment.get("command", ())))))
        facts.append(("commit", environment.get("commit") or "outside a checkout"))
    return [*facts, ("started", status.started_utc or "not yet"), ("folder", status.path)]


def _data(run: RunDetails) -> str:
    if not run.data:
        return f"{run.recipe.data.source}, not tokenised yet"
    length = run.data["train_tokens"]
    training = "a stream of" if length is None else number(length)
    return f"{run.data['source']}: {training} training and {number(run.data['validation_tokens'])} validation tokens"


def _energy(cost: Any) -> str:
    if cost["energy_j"] is None:
        return "nothing could be read"
    kwh, band = cost["energy_j"] / 3.6e6, cost["band_j"] / 3.6e6
    kind = "measured" if cost["measured"] else "an estimate"
    return (
        f"{number(kwh)} kWh ± {number(band)}, {kind}: source {cost['source']}, scope {cost['scope']}, "
        f"coverage {cost['coverage']:.1%}"
    )


def _hours(cost: Any) -> str:
    useful = cost["useful_device_hours"]
    return number(cost["device_hours"]) + ("" if useful is None else f", of them useful {number(useful)}")
