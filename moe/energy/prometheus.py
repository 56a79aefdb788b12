"""A run's cost in Prometheus' text format (0.0.4), for node_exporter's textfile collector or any scraper.

    frugal_moe_device_energy_joules_total{run="runs/mine",device="GPU-…",source="counter",scope="gpu"} 1234.5

Counters are of the whole run, earlier segments included, and grow as its ledger does. `unattributed` energy is a phase,
so phases sum to the run's energy; devices' do without it. An estimate says so in the label `source`.
"""

from collections.abc import Iterator, Mapping

from moe.energy.fold import Fold

__all__ = ["exposition"]

_Sample = tuple[dict[str, str], float]


def exposition(folds: Mapping[str, Fold]) -> str:
    """The text for several runs by name; names are their label `run`."""
    lines = []
    for metric, kind, text, samples in _metrics(folds):
        lines += [f"# HELP frugal_moe_{metric} {text}", f"# TYPE frugal_moe_{metric} {kind}"]
        for labels, value in samples:
            said = ",".join(f'{name}="{_escaped(word)}"' for name, word in labels.items())
            lines.append(f"frugal_moe_{metric}{{{said}}} {value!r}")
    return "\n".join(lines) + "\n"


def _metrics(folds: Mapping[str, Fold]) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """(name, type, help, samples) of each metric; a run that read no sensor has no energy."""
    read = {run: fold for run, fold in folds.items() if fold.total.energy_j is not None}
    yield "energy_joules_total", "counter", "Energy of the run.", [
        ({"run": run, "source": fold.total.source, "scope": fold.total.scope}, fold.total.energy_mj / 1000)
        for run, fold in read.items()
    ]  # fmt: skip
    yield "energy_band_joules", "gauge", "Declared uncertainty of the energy of the run.", [
        ({"run": run}, fold.total.band_j) for run, fold in read.items()
    ]  # fmt: skip
    yield "device_energy_joules_total", "counter", "Energy of one device, without what no segment read.", [
        ({"run": run, "device": device.uuid, "source": device.source, "scope": device.scope}, device.energy_j)
        for run, fold in read.items()
        for device in fold.devices
    ]  # fmt: skip
    yield "phase_energy_joules_total", "counter", "Energy by phase.", [
        ({"run": run, "phase": name}, phase.energy_j)
        for run, fold in read.items()
        for name, phase in fold.phases.items()
    ]  # fmt: skip
    yield "phase_seconds_total", "counter", "Time of the process by phase.", [
        ({"run": run, "phase": name}, phase.elapsed_s)
        for run, fold in folds.items()
        for name, phase in fold.phases.items()
    ]  # fmt: skip
    yield "device_seconds_total", "counter", "Devices times time held.", [
        ({"run": run}, fold.total.device_hours * 3600) for run, fold in folds.items()
    ]  # fmt: skip
    yield "coverage_ratio", "gauge", "Share of the devices' time between two valid reads.", [
        ({"run": run}, fold.total.coverage) for run, fold in folds.items()
    ]  # fmt: skip
    yield "segments_total", "counter", "Processes the run took, on all nodes.", [
        ({"run": run}, float(len(fold.segments))) for run, fold in folds.items()
    ]  # fmt: skip
    yield "tokens", "gauge", "Tokens of the final lineage.", [
        ({"run": run}, float(fold.tokens)) for run, fold in folds.items() if fold.tokens is not None
    ]  # fmt: skip
    yield "last_line_timestamp_seconds", "gauge", "When the ledger was last written to, in seconds since 1970.", [
        ({"run": run}, max(part.last_ns + part.utc_offset_ns for file in fold.files for part in file.segments) / 1e9)
        for run, fold in folds.items()
    ]  # fmt: skip


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
