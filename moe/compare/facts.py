"""What the page says about each run: hardware, model, data and meter, so that a reader can judge the comparison."""

from collections.abc import Iterator
from html import escape

from moe.compare.result import Result
from moe.compare.runs import Run
from moe.compare.sentences import evaluated, number
from moe.compare.table import cost

__all__ = ["section"]

_HASH_SHOWN = 12


def section(comparison: Result) -> str:
    """One card a run."""
    cards = []
    for entry in comparison.entries:
        rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in _facts(entry.run))
        cards.append(f'<article class="card"><h3>{escape(entry.run.name)} ({entry.role})</h3><dl>{rows}</dl></article>')
    return (
        f'<section><h2>The runs</h2><p class="hint">What each was, and how it was measured.</p>'
        f'<div class="facts">{"".join(cards)}</div></section>'
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    model, train = run.recipe.model, run.recipe.train
    yield "Hardware", run.hardware
    yield "Precision", train.precision
    yield "Parameters", f"{number(run.parameters_total)}, {number(run.parameters_active)} active"
    if model.is_moe:
        yield (
            "Experts",
            f"{model.n_routed_experts} routed, {model.num_experts_per_tok} chosen, {model.n_shared_experts} shared",
        )
    yield "Training FLOPs per token", number(run.flops_per_token)
    yield "Sequence", f"{train.seq_len} tokens"
    yield "Evaluated on", evaluated(run)
    yield "Batch", f"{train.global_batch_size} sequences"
    yield "Seed", str(run.recipe.run.seed)
    yield "Tokens", number(run.tokens)
    if run.tokens_processed > run.tokens:
        yield "Tokens with lost work", number(run.tokens_processed)
    useful = "" if run.useful_device_hours is None else f", {number(run.useful_device_hours)} useful"
    yield "Device-hours", number(run.device_hours) + useful
    yield "Energy", "no reading" if run.energy_j is None else cost("energy", run.energy_j)
    yield "Meter", f"{run.energy_source}, scope {run.energy_scope}"
    if run.measured:
        yield "Declared band", f"± {cost('energy', run.energy_band_j)}"
        yield "Coverage", f"{run.coverage:.1%}"
    for term, key in (("Validation text", "validation"), ("Tokenizer", "tokenizer"), ("Training text", "train")):
        yield term, str(run.data.get(f"{key}_sha256") or "not recorded")[:_HASH_SHOWN]
    versions = run.environment.get("versions")
    if isinstance(versions, dict) and "torch" in versions:
        yield "torch", str(versions["torch"])
    if run.environment.get("commit"):
        yield "Commit", str(run.environment["commit"])[:_HASH_SHOWN]
