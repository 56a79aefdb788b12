"""Everything a user can do wrong or a machine can do to them, as one tree.

    MoEError
    ├── ConfigError        a field, argument or file the user gave (also a ValueError)
    ├── CheckpointError    a checkpoint is missing, torn or of another run
    ├── DataError          a corpus or tokenizer cannot be used
    ├── LedgerError        an energy ledger is unreadable or its hash chain is broken
    ├── SensorError        a sensor that was asked for cannot be read
    ├── TrainingError      training cannot go on: the loss is not finite
    └── CompareError       runs cannot be compared as asked

Messages are one sentence with field, value and mend. `moe` and the recipes print it and exit with 2; in Python they are
ordinary exceptions.
"""

__all__ = [
    "CheckpointError",
    "CompareError",
    "ConfigError",
    "DataError",
    "LedgerError",
    "MoEError",
    "SensorError",
    "TrainingError",
]


class MoEError(Exception):
    """Base of all errors this package raises on purpose."""


class ConfigError(MoEError, ValueError):
    """A configuration field, command-line word or argument is wrong; the message names field, value and mend."""


class CheckpointError(MoEError):
    """A checkpoint is missing, incomplete, corrupt or belongs to another model."""


class DataError(MoEError):
    """A corpus, tokenizer or data file cannot be used."""


class LedgerError(MoEError):
    """A ledger line cannot be read, or its hash does not match the line before."""


class SensorError(MoEError):
    """A sensor that was asked for by name cannot be read on this machine."""


class TrainingError(MoEError):
    """Training cannot go on; the message names the step and the newest checkpoint."""


class CompareError(MoEError):
    """The given runs cannot be compared as asked."""
