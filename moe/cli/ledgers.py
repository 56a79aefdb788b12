"""The ledgers that a RUN argument means."""

from pathlib import Path

from moe.errors import ConfigError

__all__ = ["ledgers_of"]


def ledgers_of(run: Path) -> list[Path]:
    """The ledgers of a run directory, the first node's first, or the file itself."""
    from moe.rundir import RunDir

    if run.is_file():
        return [run]
    if not run.is_dir():
        raise ConfigError(f"{run} is neither a run directory nor a ledger file: check the path")
    found = RunDir(run).ledgers()
    if not found:
        raise ConfigError(f"{run} holds no ledger.jsonl: give the folder of a metered run")
    return found
