"""A run's cost as Prometheus reads it."""

import re
import subprocess
import sys

from moe.energy.prometheus import exposition

GOLDEN = """\
# HELP frugal_moe_energy_joules_total Energy of the run.
# TYPE frugal_moe_energy_joules_total counter
frugal_moe_energy_joules_total{run="a \\"b\\"",source="counter",scope="gpu"} 36000000.0
# HELP frugal_moe_energy_band_joules Declared uncertainty of the energy of the run.
# TYPE frugal_moe_energy_band_joules gauge
frugal_moe_energy_band_joules{run="a \\"b\\""} 1800000.0
# HELP frugal_moe_device_energy_joules_total Energy of one device, without what no segment read.
# TYPE frugal_moe_device_energy_joules_total counter
frugal_moe_device_energy_joules_total{run="a \\"b\\"",device="GPU-a",source="counter",scope="gpu"} 36000000.0
# HELP frugal_moe_phase_energy_joules_total Energy by phase.
# TYPE frugal_moe_phase_energy_joules_total counter
frugal_moe_phase_energy_joules_total{run="a \\"b\\"",phase="idle"} 36000000.0
frugal_moe_phase_energy_joules_total{run="a \\"b\\"",phase="unattributed"} 0.0
# HELP frugal_moe_phase_seconds_total Time of the process by phase.
# TYPE frugal_moe_phase_seconds_total counter
frugal_moe_phase_seconds_total{run="a \\"b\\"",phase="idle"} 1.0
frugal_moe_phase_seconds_total{run="a \\"b\\"",phase="unattributed"} 0.0
# HELP frugal_moe_device_seconds_total Devices times time held.
# TYPE frugal_moe_device_seconds_total counter
frugal_moe_device_seconds_total{run="a \\"b\\""} 14400.0
# HELP frugal_moe_coverage_ratio Share of the devices' time between two valid reads.
# TYPE frugal_moe_coverage_ratio gauge
frugal_moe_coverage_ratio{run="a \\"b\\""} 1.0
# HELP frugal_moe_segments_total Processes the run took, on all nodes.
# TYPE frugal_moe_segments_total counter
frugal_moe_segments_total{run="a \\"b\\""} 1.0
# HELP frugal_moe_tokens Tokens of the final lineage.
# TYPE frugal_moe_tokens gauge
frugal_moe_tokens{run="a \\"b\\""} 500.0
# HELP frugal_moe_last_line_timestamp_seconds When the ledger was last written to, in seconds since 1970.
# TYPE frugal_moe_last_line_timestamp_seconds gauge
frugal_moe_last_line_timestamp_seconds{run="a \\"b\\""} 1735704000.0
"""


def parse(text: str) -> dict[tuple[str, str], float]:
    """A strict reader of the format: every sample's metric was announced just before, and no series comes twice."""
    samples: dict[tuple[str, str], float] = {}
    announced: list[str] = []
    label = r'[a-z_]+="(?:[^"\\\n]|\\[\\n"])*"'
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            announced.append(line.split()[2])
        elif line.startswith("# TYPE "):
            assert re.fullmatch(rf"# TYPE {announced[-1]} (counter|gauge)", line)
        else:
            found = re.fullmatch(rf"([a-z_]+)\{{({label}(?:,{label})*)\}} (\S+)", line)
            assert found, line
            assert found[1] == announced[-1]
            assert (found[1], found[2]) not in samples
            samples[found[1], found[2]] = float(found[3])
    assert len(set(announced)) == len(announced)
    return samples


def test_the_text_is_the_golden_one(run):
    """Ten kilowatt-hours in four hours on one GPU; a name with quotes is escaped."""
    text = exposition({'a "b"': run(tokens=500)})
    assert text == GOLDEN
    assert len(parse(text)) == 12


def test_the_command_prints_several_runs(run, new_segment, tmp_path):
    """One announcement a metric, one sample a run; a run without a reading has time but no energy."""
    run()
    new_segment(file="blind.jsonl").end(60)
    command = [sys.executable, "-m", "moe.cli", "energy", "prometheus", "ledger.jsonl", "blind.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    samples = parse(done.stdout)
    held = {labels: value for (name, labels), value in samples.items() if name == "frugal_moe_device_seconds_total"}
    assert held == {'run="ledger.jsonl"': 14400.0, 'run="blind.jsonl"': 60.0}
    assert [name for name, labels in samples if "blind" in labels and "joules" in name] == []
