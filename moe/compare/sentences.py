"""What a comparison says in words: the verdict first, then what a reader must know to trust or doubt it."""

import math
from collections.abc import Sequence

from moe.compare.equal_loss import AXES, Ratio, Span, first_may_reach, scores
from moe.compare.result import Entry
from moe.compare.runs import Run, same_part

__all__ = ["ESTIMATE", "cheaper", "evaluated", "includes_one", "notes", "number", "span_text", "verdict"]

ESTIMATE = "energy is time x declared power"
"""Said whenever a side's energy is an estimate: it then holds nothing device-hours do not."""

_LOW_COVERAGE = 0.95


def notes(entries: Sequence[Entry], loss: float, unit: str, same_data: bool, axes: Sequence[str]) -> list[str]:
    """Plain sentences: each run's verdict, what was not reached, and how far the data and the meters agree."""
    at = f"{loss:.4g} {unit}"
    said: list[str] = []
    for entry in entries:
        said += [verdict(axis, ratio, at) for axis, ratio in entry.ratios.items()]
    for entry in entries:
        if not entry.crossing.reached:
            best = min(value for value, _ in scores(entry.run, unit))
            said.append(
                f"{entry.run.name} never reached {at}; its best evaluation is {best:.4g}, and nothing is extrapolated."
            )
        elif first_may_reach(entry.run, unit, loss):
            said.append(
                f"The first evaluation of {entry.run.name} may already be at {at}; nothing bounds its cost from below."
            )
    if all(entry.role == "run" for entry in entries):
        said.append("No baseline was given, so there are no ratios; name one with --baseline RUN.")
    elif not any(entry.crossing.reached for entry in entries if entry.role == "baseline"):
        said.append(f"No baseline reached {at}, so there is no ratio at this loss.")
    if any(ratio.span.high is None or ratio.span.low <= 0 for entry in entries for ratio in entry.ratios.values()):
        said.append("An interval is open where no evaluation bounds it.")
    return said + _data(entries, unit, same_data) + _meters(entries, axes)


def verdict(axis: str, ratio: Ratio, at: str) -> str:
    """The cheaper side as the subject: `A reached X with 0.74x the device-hours of B (0.61 to 0.88).`"""
    winner, loser, span = cheaper(ratio)
    sentence = f"{winner} reached {at} with {span.value:.2f}x the {AXES[axis]} of {loser}"
    sentence += f" ({span_text(span.low, span.high)})"
    if includes_one(span):
        sentence += "; the interval includes 1, so this does not tell them apart"
    return sentence + "."


def cheaper(ratio: Ratio) -> tuple[str, str, Span]:
    """The side that paid less, the other one, and the share of the other's cost it paid: at most 1."""
    span = ratio.span
    if span.value < 1:
        return ratio.baseline, ratio.run, span
    low = 0.0 if span.high is None else 1 / span.high
    return ratio.run, ratio.baseline, Span(1 / span.value, low, 1 / span.low if span.low > 0 else None)


def includes_one(span: Span) -> bool:
    """Whether a ratio's interval leaves open which side was cheaper."""
    return span.low <= 1 and (span.high is None or span.high >= 1)


def span_text(low: float, high: float | None) -> str:
    """An interval of ratios in words; an end that nothing bounds is said so."""
    if high is None:
        return f"{low:.2f} or more" if low > 0 else "no bound either way"
    return f"{low:.2f} to {high:.2f}" if low > 0 else f"{high:.2f} or less"


def number(value: float) -> str:
    """Three significant digits with a thousand's letter: `1.23M`, `0.0456`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def evaluated(run: Run) -> str:
    """What an evaluation took of the validation text: `64 sequences of 256 tokens`, `all sequences of …`."""
    seq_len, parts = run.evaluated
    counts = ["all" if part is None else str(part) for part in sorted(parts, key=lambda part: part or math.inf)]
    return f"{' or '.join(counts)} sequences of {seq_len} tokens"


def _data(entries: Sequence[Entry], unit: str, same_data: bool) -> list[str]:
    said = []
    if not same_data:
        runs = [entry.run for entry in entries]
        texts = len({run.data.get("validation_sha256") for run in runs}) > 1
        tokenizers = len({run.data.get("tokenizer_sha256") for run in runs}) > 1
        parts = not same_part(runs)
        differ = (("validation texts", texts), ("tokenizers", tokenizers), ("evaluated sequences", parts))
        reasons = " and the ".join(word for word, told in differ if told)
        reason = f"the {reasons} differ" if reasons else "the hashes of text and tokenizer were not recorded"
        said.append(f"Losses are compared in {unit}: {reason}.")
        if texts or parts:
            sequences = ", ".join(f"{run.name}: {evaluated(run)}" for run in runs)
            said.append(f"The evaluated text differs, which no unit makes up for ({sequences}).")
    if len({entry.run.data.get("train_sha256") for entry in entries}) > 1:
        said.append("The runs were trained on different text.")
    if any(point.loss_se is None for entry in entries for point in entry.run.curve):
        said.append("An evaluation without a recorded standard error counts as exact, so its interval is too narrow.")
    return said


def _meters(entries: Sequence[Entry], axes: Sequence[str]) -> list[str]:
    said = []
    runs = [entry.run for entry in entries]
    if "energy" not in axes:
        if any(run.energy_j is not None and not run.measured for run in runs):
            said.append(ESTIMATE)
        elif any(run.energy_j is None for run in runs):
            said.append("Energy is not compared: a run has no reading of it.")
        else:
            scopes = ", ".join(f"{run.name}: {run.energy_scope}" for run in runs)
            said.append(f"Energy is not compared: it needs one scope, the same on every side ({scopes}).")
    if len({run.device_name for run in runs}) > 1:
        kinds = ", ".join(f"{run.name}: {run.hardware}" for run in runs)
        said.append(f"A device-hour is not the same thing on both sides ({kinds}).")
    for run in runs:
        if run.measured and run.coverage < _LOW_COVERAGE:
            said.append(f"The meter of {run.name} covers {run.coverage:.0%} of its time; the rest is not counted.")
        said += [f"{run.name}: {note}." for note in run.meter_notes if note != ESTIMATE]
    return said
