"""Command-line words `section.field=value` on top of a recipe."""

import dataclasses
import typing
from collections.abc import Sequence

from moe.config.fields import convert, describe_type, nearest, shortened
from moe.config.recipe import Recipe
from moe.errors import ConfigError

__all__ = ["help_text", "parse_overrides"]


def parse_overrides(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe with `words` applied; all are read before any is checked. Of a field given twice the last counts.

    Raises ConfigError for a word that is not `section.field=value`, an unknown name (the nearest one is suggested), a
    value of the wrong type, or a resulting recipe that contradicts itself.
    """
    sections = recipe.sections()
    changes: dict[str, dict[str, object]] = {}
    for word in words:
        path, equals, text = word.partition("=")
        section_name, dot, field_name = path.partition(".")
        if not equals or not dot:
            raise ConfigError(
                f"{shortened(word)!r} is not of the form section.field=value, for example train.max_steps=100"
            )
        if section_name not in sections:
            raise ConfigError(f"{shortened(word)}: no section {section_name!r}{nearest(section_name, sections)}")
        section_type = type(sections[section_name])
        hints = typing.get_type_hints(section_type)
        known = [field.name for field in dataclasses.fields(section_type)]
        if field_name not in known:
            elsewhere = [f"{name}.{field_name}" for name, section in sections.items() if hasattr(section, field_name)]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else nearest(field_name, known)
            raise ConfigError(f"{shortened(word)}: no field {field_name!r} in section {section_name!r}{hint}")
        changes.setdefault(section_name, {})[field_name] = convert(path, text, hints[field_name])
    replaced = {name: dataclasses.replace(sections[name], **values) for name, values in changes.items()}
    return dataclasses.replace(recipe, **replaced)  # type: ignore[arg-type]


def help_text(recipe: Recipe) -> str:
    """Every field with its value in this recipe, its type and its meaning."""
    lines = ["Set any field with section.field=value. Fields, and this recipe's values:"]
    for name, section in recipe.sections().items():
        hints = typing.get_type_hints(type(section))
        lines.append("")
        for field in dataclasses.fields(section):
            value = section.to_dict()[field.name]
            shown = "none" if value in (None, []) else ",".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"  {name}.{field.name}={shown}")
            lines.append(f"      {describe_type(hints[field.name])}: {field.metadata['doc']}")
    return "\n".join(lines)
