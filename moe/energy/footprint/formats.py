"""Reads series files: CSV of our own, and what Electricity Maps, WattTime and the UK's NESO hand out. No network.

file                     shape                                               kind
CSV                      utc,g_per_kwh[,signal,factor_type]                  as its columns say
CSV of prices            utc,price_per_kwh                                   price
Electricity Maps         history[] or data[] of {datetime, carbonIntensity}  average, lifecycle or direct
WattTime v3              data[] of {point_time, value}, lb CO2/MWh           marginal (co2_moer), average (co2_aoer)
NESO carbon intensity    data[] of {from, to, intensity{actual, forecast}}   average, direct
NESO, of one region      the same in data{data[]} or data[{data[]}]          average, direct

Each value holds from its own time to the next one's, at most for the step that is most common in the file: a longer
wait is a gap. Times without a zone are UTC.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe.energy.footprint.series import Point, Series
from moe.errors import ConfigError

__all__ = ["read_intensities", "read_prices"]

LB_PER_MWH = 453.59237 / 1000  # gram per kWh
# column -> how files in another unit call it, and what their values are worth in ours
_OTHER_UNITS = {
    "g_per_kwh": {
        "g_per_mwh": 0.001,
        "kg_per_kwh": 1000.0,
        "kg_per_mwh": 1.0,
        "t_per_mwh": 1000.0,
        "lb_per_mwh": LB_PER_MWH,
        "lbs_per_mwh": LB_PER_MWH,
    },
    "price_per_kwh": {"price_per_mwh": 0.001},
}


def read_intensities(path: Path) -> Series:
    """A series of grid carbon intensity in g/kWh. Raises ConfigError that names the file and what is wrong."""
    text = _text(path)
    if not text.lstrip().startswith(("{", "[")):
        return _csv(path, text, "g_per_kwh", "g/kWh")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"series {path} is no JSON ({error}): save the service's answer unchanged") from None
    try:
        return _json(path, content)
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"series {path} is not as Electricity Maps, WattTime v3 or NESO write it ({type(error).__name__} {error}): "
            "save the service's answer unchanged, or write utc,g_per_kwh as CSV"
        ) from None


def read_prices(path: Path) -> Series:
    """A series of prices of a kWh. Raises ConfigError that names the file and what is wrong."""
    return _csv(path, _text(path), "price_per_kwh", "currency/kWh")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"series {path} cannot be read ({why}): give a CSV or JSON file") from None


def _csv(path: Path, text: str, column: str, unit: str) -> Series:
    lines = csv.DictReader(text.splitlines())
    try:
        header = [name.strip() for name in lines.fieldnames or ()]
        lines.fieldnames = header
        rows = list(lines)
    except csv.Error as error:
        raise ConfigError(f"series {path} is no CSV ({error}): its first line must be utc,{column}") from None
    if header[:1] != ["utc"] or column not in header:
        for name in header:
            if worth := _OTHER_UNITS[column].get(name.casefold()):
                raise ConfigError(f"series {path} is in {name}: multiply by {worth:.9g} and name the column {column}")
        raise ConfigError(f"series {path} begins with {','.join(header)!r}: its first line must be utc,{column}")
    try:
        values = [(_utc_ns(row["utc"]), float(row[column])) for row in rows if row[column].strip()]
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"series {path} has a line that is not utc,{column} ({error}): correct it") from None
    kinds = [_one(path, name, (row.get(name) for row in rows)) for name in ("signal", "factor_type")]
    kind = _kind(*kinds) if column == "g_per_kwh" else "price"
    return Series.from_points(str(path), _lasting(path, values), unit=unit, kind=kind, source=f"file {path}")


def _json(path: Path, content: dict[str, Any]) -> Series:
    rows: Any = content.get("history", content.get("data"))
    if "error" in content:
        raise ConfigError(
            f"series {path} is the service's refusal ({content['error']}): ask again, and save the answer"
        )
    region = rows[0] if isinstance(rows, list) and rows and "data" in rows[0] else rows
    if isinstance(region, dict):  # NESO's answer for one region lies one level deeper
        return _neso(path, region["data"], f"NESO carbon intensity of {region.get('shortname', 'one region')}")
    first = rows[0]
    if "regions" in first:
        raise ConfigError(f"series {path} holds all regions: ask NESO for one, /regional/intensity/FROM/TO/regionid/ID")
    if "carbonIntensity" in first:
        return _electricity_maps(path, rows)
    if "point_time" in first:
        return _watttime(path, rows, content.get("meta") or {})
    if "intensity" in first:
        return _neso(path, rows, "NESO carbon intensity")
    raise KeyError(", ".join(sorted(first)))


def _electricity_maps(path: Path, rows: list[dict[str, Any]]) -> Series:
    values = [(_utc_ns(row["datetime"]), row["carbonIntensity"]) for row in rows]
    factor_type = _one(path, "emissionFactorType", (row.get("emissionFactorType") for row in rows))
    guessed = sum(bool(row.get("isEstimated")) for row in rows)
    notes = (f"{guessed} of the {len(rows)} values in {path} are Electricity Maps' estimates",) if guessed else ()
    points = _lasting(path, [(at_ns, float(value)) for at_ns, value in values if value is not None])
    kind = _kind("average", factor_type)
    source = f"Electricity Maps, file {path}"
    return Series.from_points(str(path), points, unit="g/kWh", kind=kind, source=source, notes=notes)


def _watttime(path: Path, rows: list[dict[str, Any]], meta: dict[str, Any]) -> Series:
    units = meta.get("units", "lbs_co2_per_mwh")
    if units != "lbs_co2_per_mwh":
        raise ConfigError(f"series {path} is in {units}: ask WattTime for co2_moer or co2_aoer, in lbs_co2_per_mwh")
    signals = {"co2_moer": "marginal", "co2_aoer": "average"}
    points = _lasting(path, [(_utc_ns(row["point_time"]), row["value"] * LB_PER_MWH) for row in rows])
    kind = _kind(signals.get(meta.get("signal_type", "")), None)
    source = f"WattTime v3 {meta.get('region', '')}, file {path}".replace(" ,", ",")
    return Series.from_points(str(path), points, unit="g/kWh", kind=kind, source=source)


def _neso(path: Path, rows: list[dict[str, Any]], name: str) -> Series:
    if "average" in rows[0]["intensity"]:
        raise ConfigError(
            f"series {path} holds NESO's statistics: ask for /intensity/FROM/TO, which has every half hour"
        )
    points, forecasts = [], 0
    for row in rows:
        value = row["intensity"].get("actual")
        if value is None:
            value, forecasts = row["intensity"]["forecast"], forecasts + 1
        if value is not None:
            points.append(Point(_utc_ns(row["from"]), _utc_ns(row["to"]), float(value)))
    notes = (f"{forecasts} of the {len(rows)} values in {path} are forecasts: no actual one is given",)
    return Series.from_points(
        str(path),
        points,
        unit="g/kWh",
        kind="average, direct",
        source=f"{name}, file {path}",
        notes=notes if forecasts else (),
    )


def _lasting(path: Path, values: list[tuple[int, float]]) -> Iterator[Point]:
    """Values that have only a beginning, each made to last until the next or for the usual step."""
    starts = sorted({at_ns for at_ns, _ in values})
    if len(starts) < 2:
        raise ConfigError(f"series {path} has {len(starts)} times: at least two tell how long a value holds")
    steps = Counter(after - before for before, after in pairwise(starts))
    usual = min(steps, key=lambda step: (-steps[step], step))
    ends = dict(zip(starts, [*starts[1:], starts[-1] + usual], strict=True))
    return (Point(at_ns, min(ends[at_ns], at_ns + usual), value) for at_ns, value in values)


def _utc_ns(text: str) -> int:
    moment = datetime.fromisoformat(text.strip())
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp()) * 10**9


def _one(path: Path, name: str, words: Iterable[str | None]) -> str | None:
    """The one word a column holds."""
    found = sorted({word.strip() for word in words if word and word.strip()})
    if len(found) > 1:
        raise ConfigError(f"series {path} mixes {name} {' and '.join(found)}: give one kind in a file")
    return found[0] if found else None


def _kind(signal: str | None, factor_type: str | None) -> str:
    return f"{signal or 'average or marginal not stated'}, {factor_type or 'lifecycle or direct not stated'}"
