"""What every configuration section shares: frozen keyword-only dataclasses whose fields check their own type and range.

A field declares its type by annotation (`int`, `float`, `bool`, `str`, `X | None`, `Literal[...]`, `tuple[X, ...]`)
and its range with `setting(default, at_least=…, above=…, below=…, doc=…)`. `Section.__post_init__` checks both, so a
bad value is one ConfigError wherever it came from: Python, a command line, or a config.json.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from moe.errors import ConfigError

__all__ = ["Section", "convert", "describe_type", "nearest", "setting", "shortened"]

_FEW = 16  # names a message lists
_SHOWN = 80  # characters of a value it shows


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    may_change: bool = False,
) -> Any:
    """A dataclass field with its one-line meaning and the range its numbers must lie in.

    `may_change`: a resumed run may have another value: how long, how watched, how saved; never what is learnt.
    """
    metadata = {
        "doc": doc, "at_least": at_least, "above": above, "at_most": at_most, "below": below, "may_change": may_change
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the configuration dataclasses. `section_name` is the word before the dot on the command line."""

    section_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _check_type(self._path(field.name), getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)
            _check_range(self._path(field.name), value, field.metadata)

    @classmethod
    def _path(cls, field_name: str) -> str:
        return f"{cls.section_name}.{field_name}" if cls.section_name else field_name

    def fail(self, field_name: str, mend: str) -> typing.NoReturn:
        """Raise a ConfigError that names this section's field, its value and the mend."""
        raise ConfigError(f"{self._path(field_name)}={shortened(repr(getattr(self, field_name)))} {mend}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values. Raises ConfigError for an unknown field, with the nearest known name."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"{cls._path(name)} is not a field{nearest(name, known)}")
        return cls(**values)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or where to find them all when none is close."""
    import difflib

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if len(names) <= _FEW else "; the recipe's --help lists them"


def shortened(text: str) -> str:
    """A value as a message shows it: enough to know it by."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def describe_type(hint: Any) -> str:
    """`int`, `true or false`, `one of 'a', 'b'`, … for messages and help."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if part is type(None) else describe_type(part) for part in arguments)
    if origin is tuple:
        return f"a comma-separated list, each {describe_type(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def convert(path: str, text: str, hint: Any) -> Any:
    """Turn the command-line word `text` into the type `hint`. Raises ConfigError with the type that was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments and text.lower() == "none":
            return None
        parts = [part for part in arguments if part is not type(None)]
        return convert(path, text, parts[0])
    if origin is tuple:
        if text.lower() == "none":
            return ()
        return tuple(convert(path, part.strip(), arguments[0]) for part in text.split(",") if part.strip())
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text.replace("_", ""))
        except ValueError:
            pass
    elif hint is str or origin is Literal:
        return text
    raise ConfigError(f"{path}={shortened(text)} must be {describe_type(hint)}")


def _check_type(path: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for part in arguments:
            if part is type(None):
                if value is None:
                    return None
            elif value is not None:
                return _check_type(path, value, part)
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_check_type(path, part, arguments[0]) for part in value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}={shortened(repr(value))} must be {describe_type(hint)}")


def _check_range(path: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, tuple):
        for part in value:
            _check_range(path, part, metadata)
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    rules = (
        ("at_least", value >= (metadata.get("at_least") or 0), "at least"),
        ("above", value > (metadata.get("above") or 0), "above"),
        ("at_most", value <= (metadata.get("at_most") or 0), "at most"),
        ("below", value < (metadata.get("below") or 0), "below"),
    )
    for rule, holds, words in rules:
        if metadata.get(rule) is not None and not holds:
            raise ConfigError(f"{path}={value!r} must be {words} {metadata[rule]:g}")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
