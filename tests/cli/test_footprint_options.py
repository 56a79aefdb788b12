"""The options that fill `Stated`, given to a command in one place."""

from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from moe.cli.energy import app
from moe.cli.footprint_options import footprint_options
from moe.energy.footprint import Stated


@pytest.mark.parametrize("command", ["report", "total"])
def test_each_fact_a_user_can_state_has_an_option(command):
    """A field of `Stated` that no option of these commands fills, or an option too many, fails here."""
    options = {parameter.name for parameter in typer.main.get_command(app).commands[command].params}
    assert {field.name for field in fields(Stated)} <= options
    assert options - {field.name for field in fields(Stated)} <= {"run", "paths", "as_json", "node"}


def test_what_is_given_arrives_as_one_object_of_facts():
    """Options a command does without are unknown to it, and keep their defaults; its own ones stay."""
    app, seen = typer.Typer(), []

    @app.command()
    @footprint_options(without=("price",))
    def command(name: str, *, said: Stated) -> None:
        seen.append((name, said))

    runner = CliRunner()
    assert runner.invoke(app, ["run", "--pue", "1.2", "--wue", "0.3", "--wue", "withdrawn=1", "--plain"]).exit_code == 0
    assert seen == [("run", Stated(pue="1.2", wue=("0.3", "withdrawn=1"), plain=True))]
    assert runner.invoke(app, ["run", "--price", "2"]).exit_code == 2
