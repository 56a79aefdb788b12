"""Software Carbon Intensity (ISO/IEC 21031): (E x I + M) per R, here per run and per 1e9 tokens.

E is the energy of the hardware while it was reserved, idle time included; I is the location's intensity, average or
marginal, never a contract's; M is the run's share of making the whole servers.
"""

from moe.energy.footprint.quantity import Interval, Quantity

__all__ = ["sci_of"]


def sci_of(carbon: Quantity, embodied: Quantity, tokens: int | None) -> dict[str, Quantity]:
    """`sci_run`, and `sci_per_1e9_tokens` when the run told its tokens. `carbon` must be location-based."""
    run = Quantity(
        amount=carbon.amount + embodied.amount,
        unit="gCO2e/run",
        source=f"{carbon.source}; {embodied.source}",
        scope=f"{carbon.scope}, {embodied.scope}",
        method=f"({carbon.method}) + ({embodied.method})",
        energy=carbon.energy,
    )
    if not tokens:
        return {"sci_run": run}
    per_tokens = run.times(
        Interval.exactly(1e9 / tokens),
        unit="gCO2e/1e9 tokens",
        source=f"{tokens} tokens of the final lineage",
        method=f"({run.method}) / tokens x 1e9",
    )
    return {"sci_run": run, "sci_per_1e9_tokens": per_tokens}
