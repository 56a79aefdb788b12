"""Measures what a program costs, and writes it down so that it survives the program: counters -> readings -> windows ->
ledger -> totals -> footprint. Knows no model and imports no torch.

    from moe.energy import EnergyMeter, fold_ledgers

    with EnergyMeter(ledger=Path("ledger.jsonl")) as meter:
        with meter.window("work") as window:
            work()
        print(window.energy_j, window.band_j, window.source)

    print(fold_ledgers([Path("ledger.jsonl")]).total.energy_j)
"""

from moe.energy.fold import Fold, fold_ledgers
from moe.energy.ledger import read_ledger
from moe.energy.meter import METERED_BY, EnergyMeter
from moe.energy.sources import Device, Source, VisibleGpu, select_sources, visible_gpus
from moe.energy.totals import LedgerPosition, Totals
from moe.energy.window import Window

__all__ = [
    "METERED_BY",
    "Device",
    "EnergyMeter",
    "Fold",
    "LedgerPosition",
    "Source",
    "Totals",
    "VisibleGpu",
    "Window",
    "fold_ledgers",
    "read_ledger",
    "select_sources",
    "visible_gpus",
]
