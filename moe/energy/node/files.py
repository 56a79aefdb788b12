"""Node energy from files that other tools write. The format is told from the content.

    CSV         a header with `utc` (ISO 8601 or seconds since 1970) and `watts`, or `joules` of a counter; `host` where
                there are several: what a PDU or Prometheus exports
    IPMI        outputs of `ipmitool dcmi power reading`, one after the other, each best after a line with the time
    Redfish     JSON objects of Power or EnvironmentMetrics, each with a `utc` (and `host`) of its own
    SLURM       `SLURM_TIME_FORMAT=%s sacct -j JOB -P -o JobID,Start,End,ConsumedEnergyRaw`
    pm_counters lines of Cray's `energy` file: `81147367 J 1700061210920464 us`

Every mistake is a ConfigError that names the file and, where there is one, the line.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moe.energy.node.series import NodeSeries, Piece
from moe.errors import ConfigError

__all__ = ["read_node_file"]

SACCT_UNKNOWN_J = 1e15  # SLURM writes 2^64 - 2 where it knows nothing
EARLIEST_YEAR = 2010  # a clock before it was never set

Points = list[tuple[int, float]]


def read_node_file(path: Path) -> list[NodeSeries]:
    """The series of a file, one a host."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}): check the path") from None
    try:
        found = _told(path, text)
    except csv.Error as error:
        raise ConfigError(f"{path} is no CSV ({error}): correct it") from None
    if not any(one.pieces for one in found):
        raise ConfigError(f"{path} holds fewer than two readings: nothing can be said about the time between")
    return found


def _told(path: Path, text: str) -> list[NodeSeries]:
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith(("{", "[")):
        return _redfish(path, text)
    if "ConsumedEnergyRaw" in first:
        return _sacct(path, lines)
    if "Instantaneous power reading" in text:
        return _ipmi(path, lines)
    if re.match(r"\d+ J\b", first):
        return _pm_counters(path, lines)
    return _csv(path, lines)


def _time_ns(text: str, where: str) -> int:
    """Nanoseconds since 1970 of seconds or ISO 8601; without a zone it is UTC."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ConfigError(
                f"{where}: {text!r} is no time: write 2026-01-31T12:00:00Z or seconds since 1970"
            ) from None
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds) or not EARLIEST_YEAR <= _year(seconds) < 3000:
        raise ConfigError(f"{where}: {text!r} is no time a run can have: its clock was never set")
    return round(seconds * 1e9)


def _year(seconds: float) -> float:
    return 1970 + seconds / (365.2425 * 86400)


def _number(text: object, name: str, where: str) -> float:
    try:
        number = float(str(text))
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{where}: {name} {text!r} is no number of at least 0")
    return number


def _csv(path: Path, lines: list[str]) -> list[NodeSeries]:
    rows = csv.DictReader(lines, skipinitialspace=True)
    names = set(rows.fieldnames or ())
    unit = next((name for name in ("joules", "watts") if name in names), None)
    if "utc" not in names or unit is None:
        raise ConfigError(f"{path} has no header with utc and watts, or utc and joules: name its columns so")
    points: dict[str | None, Points] = {}
    for row in rows:
        where = f"{path} line {rows.line_num}"
        at_ns = _time_ns(row["utc"] or "", where)
        points.setdefault(row.get("host") or None, []).append((at_ns, _number(row[unit], unit, where)))
    make = NodeSeries.from_counter if unit == "joules" else NodeSeries.from_power
    return [make("node:csv", host, found) for host, found in points.items()]


def _ipmi(path: Path, lines: list[str]) -> list[NodeSeries]:
    points: Points = []
    told_ns: int | None = None  # the time written before an output
    clock_ns: int | None = None  # the management controller's own, in UTC
    power_w: float | None = None
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        name, _, value = (part.strip() for part in line.partition(":"))
        if name == "Instantaneous power reading":
            power_w, clock_ns = _number(value.removesuffix("Watts").strip(), "power", where), None
        elif name == "IPMI timestamp" and told_ns is None:
            clock_ns = _controller_time_ns(value, where)
        elif name == "Power reading state is":
            at_ns = told_ns if told_ns is not None else clock_ns
            if value == "activated" and power_w is not None and at_ns is not None:
                points.append((at_ns, power_w))
            told_ns = power_w = None
        elif re.match(r"\d{4}-\d\d-\d\d|\d{9,}", line.strip()):
            told_ns = _time_ns(line.strip(), where)
    return [NodeSeries.from_power("node:ipmi", None, points)]


def _controller_time_ns(text: str, where: str) -> int:
    for form in ("%a %b %d %H:%M:%S %Y", "%m/%d/%y %H:%M:%S %Z", "%m/%d/%Y %H:%M:%S"):
        try:
            moment = datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        if moment.year >= EARLIEST_YEAR:
            return round(moment.timestamp() * 1e9)
    raise ConfigError(f"{where}: the controller's clock says {text!r}: print `date -u +%FT%TZ` before each reading")


def _redfish(path: Path, text: str) -> list[NodeSeries]:
    power: dict[str | None, Points] = {}
    energy: dict[str | None, Points] = {}
    for number, reading in enumerate(_json_objects(path, text), 1):
        where = f"{path} reading {number}"
        if "utc" not in reading:
            raise ConfigError(f"{where} has no utc: add the time at which it was asked for to the JSON object")
        at_ns, host = _time_ns(str(reading["utc"]), where), reading.get("host")
        if not isinstance(host, str | None):
            raise ConfigError(f"{where}: host {host!r} is no name: give a string")
        control = reading.get("PowerControl") or [{"PowerConsumedWatts": _reading(reading, "PowerWatts")}]
        if not isinstance(control, list) or not isinstance(control[0], dict):
            raise ConfigError(f"{where}: PowerControl is no list of objects: save the service's answer unchanged")
        power_w = control[0].get("PowerConsumedWatts")
        energy_kwh = _reading(reading, "EnergykWh")
        if power_w is not None:
            power.setdefault(host, []).append((at_ns, _number(power_w, "power", where)))
        elif energy_kwh is not None:
            energy.setdefault(host, []).append((at_ns, _number(energy_kwh, "energy", where) * 3.6e6))
        else:
            raise ConfigError(f"{where} tells neither PowerConsumedWatts nor PowerWatts nor EnergykWh")
    found = [NodeSeries.from_power("node:redfish", host, points) for host, points in power.items()]
    return found + [NodeSeries.from_counter("node:redfish", host, points) for host, points in energy.items()]


def _reading(reading: dict[str, Any], name: str) -> object:
    value = reading.get(name)
    return value.get("Reading") if isinstance(value, dict) else value


def _json_objects(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Objects one after the other, or in lists, with any white space between."""
    decoder, position = json.JSONDecoder(), 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON ({error}): give one object a reading") from None
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise ConfigError(f"{path} holds {item!r}: give one JSON object a reading")
            yield item


def _sacct(path: Path, lines: list[str]) -> list[NodeSeries]:
    """The job as a whole: its steps ran beside each other on the same nodes, so their energies are never added."""
    rows = list(csv.DictReader(lines, delimiter="|"))
    missing = {"JobID", "Start", "End", "ConsumedEnergyRaw"} - set(rows[0] if rows else ())
    if missing:
        raise ConfigError(f"{path} has no {', '.join(sorted(missing))}: sacct -P -o JobID,Start,End,ConsumedEnergyRaw")
    jobs = {row["JobID"].partition(".")[0] for row in rows}
    if len(jobs) > 1:
        raise ConfigError(f"{path} holds the jobs {', '.join(sorted(jobs))}: ask sacct for the run's alone")
    known = [row for row in rows if 0 < _number(row["ConsumedEnergyRaw"] or 0, "energy", str(path)) < SACCT_UNKNOWN_J]
    if not known:
        raise ConfigError(f"{path}: SLURM knows no energy of this job: its AcctGatherEnergyType is not set")
    whole = max(known, key=lambda row: ("." not in row["JobID"], float(row["ConsumedEnergyRaw"])))
    times = []
    for name in ("Start", "End"):
        if not whole[name].strip().isdigit():
            raise ConfigError(f"{path}: {name} {whole[name]!r} has no zone: run sacct with SLURM_TIME_FORMAT=%s")
        times.append(_time_ns(whole[name], str(path)))
    if times[1] <= times[0]:
        raise ConfigError(f"{path}: the job ends before it starts: ask sacct when it is over")
    return [NodeSeries("node:slurm", None, (Piece(times[0], times[1], float(whole["ConsumedEnergyRaw"])),))]


def _pm_counters(path: Path, lines: Iterable[str]) -> list[NodeSeries]:
    points: Points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+) J (\d+) us", line.strip())
        if match is None:
            raise ConfigError(f"{path} line {number}: {line!r} is no energy with its time: `JOULES J MICROSECONDS us`")
        points.append((int(match[2]) * 1000, float(match[1])))
    return [NodeSeries.from_counter("node:pm_counters", None, points)]
