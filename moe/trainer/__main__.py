"""`accelerate launch -m moe.trainer runs/NAME [section.field=value …]`: go on with the run in a directory.

The recipe is the directory's config.json; a run that was moved or renamed with its folder is the one in that folder.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from moe.config import Recipe
from moe.errors import ConfigError, MoEError
from moe.rundir import RunDir
from moe.trainer.entry import exit_with, main

__all__ = ["recipe_of"]


def recipe_of(words: Sequence[str]) -> Recipe:
    """The recipe in the run directory that the first word names, to be resumed. Raises ConfigError or CompareError."""
    if not words or "=" in words[0] or words[0].startswith("-"):
        raise ConfigError("no run directory: accelerate launch -m moe.trainer runs/NAME [section.field=value ...]")
    run = RunDir.existing(words[0])
    recipe = Recipe.read(run.config)
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, name=run.name, directory=os.path.relpath(run.root.resolve().parent)),
        train=dataclasses.replace(recipe.train, resume="auto"),
    )


if __name__ == "__main__":
    try:
        RECIPE = recipe_of(sys.argv[1:])
    except MoEError as error:
        exit_with(str(error))
    main(RECIPE, sys.argv[2:])
