"""How a run stands: its state, how far it is, what it reached and what it cost so far.

    running       a living process holds the ledger's lock
    complete      at train.max_steps, with a whole checkpoint of it, and ended by itself
    stopped       ended by itself before that: a signal, a budget, an error; the same command goes on
    killed        its last process wrote no end to the ledger; the same command goes on
    not trained   no step is logged yet
    broken        a file cannot be read; `problem` says which
    no run        a folder without a config.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.energy.locks import is_locked
from moe.errors import CheckpointError, ConfigError, MoEError
from moe.rundir import RunDir, read_metrics
from moe.runs.checkpoints import check_sizes

if TYPE_CHECKING:
    from moe.energy import Fold

__all__ = ["RunStatus", "list_runs", "read_status"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run in a line. What its files do not tell is None. `measured` is false where energy is an estimate."""

    name: str
    path: str
    state: str
    problem: str | None = None
    started_utc: str | None = None
    step: int = 0
    max_steps: int | None = None
    tokens: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    device_hours: float | None = None
    energy_kwh: float | None = None
    energy_source: str | None = None
    measured: bool | None = None


def list_runs(folder: Path) -> list[RunStatus]:
    """The status of every folder in `folder`, by name. Raises ConfigError when it is not a folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the one that holds the runs, such as runs")
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [read_status(path) for path in sorted(folders)]


def read_status(path: Path) -> RunStatus:
    """The status of the run at `path`; never raises for what lies in it."""
    run = RunDir(path)
    if not run.config.is_file():
        return RunStatus(name=run.name, path=str(path), state="no run", problem=f"{path} holds no config.json")
    try:
        return _status(run)
    except MoEError as error:
        return RunStatus(name=run.name, path=str(path), state="broken", problem=str(error))
    except (OSError, TypeError, ValueError, LookupError, AttributeError) as error:
        problem = f"{path} is not as this program writes it ({type(error).__name__} {error})"
        return RunStatus(name=run.name, path=str(path), state="broken", problem=problem)


def _status(run: RunDir) -> RunStatus:
    from moe.energy import fold_ledgers

    max_steps = int(run.read_json(run.config)["train"]["max_steps"])
    rows = read_metrics(run.metrics) if run.metrics.is_file() else []
    fold = fold_ledgers(run.ledgers()) if run.ledgers() else None
    step = max((int(row["train/step"]) for row in rows), default=0)
    return RunStatus(
        name=run.name,
        path=str(run.root),
        state=_state(run, step, max_steps, fold),
        started_utc=fold.segments[0].start_utc if fold else None,
        step=step,
        max_steps=max_steps,
        tokens=int(_latest(rows, "train/tokens") or 0),
        train_loss=_latest(rows, "train/loss"),
        eval_loss=_latest(rows, "eval/loss"),
        device_hours=fold.total.device_hours if fold else None,
        energy_kwh=fold.total.energy_j / 3.6e6 if fold and fold.total.energy_j is not None else None,
        energy_source=fold.total.source if fold else None,
        measured=fold.total.measured if fold else None,
    )


def _latest(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The last value of `name` in the rows."""
    return next((float(row[name]) for row in reversed(rows) if name in row), None)


def _state(run: RunDir, step: int, max_steps: int, fold: "Fold | None") -> str:
    if is_locked(run.ledger()):
        return "running"
    if step == 0:
        return "not trained"
    if fold and fold.files[0].segments[-1].end_reason is None:
        return "killed"
    try:
        check_sizes(run.checkpoints / f"step_{max_steps:08d}")
    except CheckpointError:
        return "stopped"
    return "complete"
