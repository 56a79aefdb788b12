"""`moe energy doctor` says what of this machine can be measured, how well, and how to get the rest."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe.cli.printable import printable

if TYPE_CHECKING:
    from moe.energy.doctor import Diagnosis, Sensor

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON and nothing else.")] = False,
    sys_root: Annotated[Path, typer.Option("--sys", metavar="DIR", help="Where this machine's sysfs is.")] = Path(
        "/sys"
    ),
) -> None:
    """Say what of this machine can be measured, how well, and how to get the rest.

    The exit code is 0 whatever is found: a machine without sensors is an answer. Scripts ask for `measured` in --json.
    """
    from moe.energy.doctor import examine

    diagnosis = examine(sys_root)
    print(json.dumps(diagnosis.to_json(), indent=2, allow_nan=False) if as_json else _page(diagnosis))


def _page(diagnosis: "Diagnosis") -> str:
    used = [sensor.device for sensor in diagnosis.sensors if sensor.by_default]
    sources = "+".join(sorted({device.source for device in used}))
    scopes = "+".join(sorted({device.scope for device in used}))
    verdict = f"a run here is {'metered by' if diagnosis.measured else 'not measured:'} {sources}, scope {scopes}"
    if not used:
        verdict = "a run here cannot be metered before its GPUs can be read"
    lines = [f"{diagnosis.host}: {verdict}", ""]
    heads = ("device", "name", "source", "scope", "band", "tick", "read")
    rows = [heads, *(_row(sensor) for sensor in diagnosis.sensors)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    remarks = []
    for sensor in diagnosis.sensors:
        if sensor.failure is not None:
            remarks.append(f"{sensor.device.uuid}: {sensor.failure}")
        if sensor.device.note is not None:
            remarks.append(f"{sensor.device.uuid}: {sensor.device.note}")
        if sensor.reader_pid is not None:
            remarks.append(f"{sensor.device.uuid}: another meter reads it, process {sensor.reader_pid}")
    if remarks:
        lines += ["", *remarks]
    if diagnosis.missing:
        lines += ["", "not measured", *(f"- {lack.what}: {lack.why}; {lack.mend}" for lack in diagnosis.missing)]
    return printable("\n".join(lines))


def _row(sensor: "Sensor") -> tuple[str, ...]:
    device = sensor.device
    tick = f"{sensor.tick_s * 1000:.0f} ms" if sensor.tick_s >= 0.001 else "-"
    if tick != "-" and not sensor.tick_seen:
        tick += " declared"
    call = f"{sensor.call_us:.0f} us" if sensor.call_us else "-"
    return (device.uuid, device.name, device.source, device.scope, f"{device.band:.0%}", tick, call)
