"""Launch the tiny recipe with one field after another set to nonsense, all in this process; print how each ended.

    fuzzed_launches.py FIRST LAST     mutations FIRST … LAST - 1, one JSON line each: words, exit code, stderr

A launch that trains stops after its first step. One that lasts two minutes is killed by the alarm, with a traceback.
"""

import contextlib
import io
import json
import random
import signal
import sys
import traceback
import typing

from tiny_recipe import RECIPE

from moe.trainer import main

# by the type a field has; every third value is one that no such field takes
VALUES = {
    "int": ["0", "1", "2", "3", "4", "5", "7", "8", "12", "16", "64", "1000", "-1", "1000000000"],
    "float": ["0", "1", "0.5", "0.1", "1e-30", "1e30", "-0.5", "1.5", "2"],
    "bool": ["true", "false"],
    "str": ["text", "stdlib", "x", "none", ".", "/proc", "nowhere/x", "💧", "a b", "x" * 5000, ""],
    "nonsense": ["", "none", "yes", "a,b", ",", "nan", "inf", "-inf", "0x10", "null", "1e400", "💧", "x" * 5000, "\n"],
}
FIXED = ("train.max_device_hours=1e-9", "train.eval_sequences=2")


def mutation(seed: int) -> list[str]:
    """Words of one launch: one or two fields with values from the lists, or another field's name misspelt."""
    chance = random.Random(seed)
    fields = {
        f"{name}.{field}": _fitting(hint)
        for name, section in RECIPE.sections().items()
        for field, hint in typing.get_type_hints(type(section)).items()
        if field != "section_name"
    }
    words = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        field = chance.choice(list(fields))
        value = chance.choice(VALUES["nonsense"] if chance.random() < 0.3 else fields[field])
        if chance.random() < 0.05:
            place = chance.randrange(len(field))
            field = field[:place] + chance.choice("._x=") + field[place + 1 :]
        words.append(f"{field}={value}")
    return words


def _fitting(hint: object) -> list[str]:
    """Values of a field's type, if not of its range."""
    choices = [str(choice) for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal
               for choice in typing.get_args(part)]  # fmt: skip
    if choices:
        return choices
    kinds = [kind for kind in ("int", "float", "bool", "str") if kind in str(hint)]
    return VALUES[kinds[0]] if kinds else VALUES["nonsense"]


def launch(words: list[str]) -> tuple[int, str]:
    """Exit code (-1: an exception came out) and everything on stderr."""
    said = io.StringIO()
    code = 0
    signal.alarm(120)  # torch.compile alone takes up to 30 s
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(RECIPE, words)
        except SystemExit as ending:
            code = int(ending.code or 0)
        except BaseException:
            code = -1
            traceback.print_exc()
    signal.alarm(0)
    return code, said.getvalue()


def _too_long(*_: object) -> None:
    raise TimeoutError("a launch of a mutated recipe lasted two minutes")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_long)
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        words = [*FIXED, f"run.name=fuzz{seed}", *mutation(seed)]
        code, said = launch(words)
        print(json.dumps({"seed": seed, "words": words, "code": code, "said": said[-3000:]}), flush=True)
