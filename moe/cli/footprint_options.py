"""The options that state factors of a footprint: the same for every command that prints carbon, water or money."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

__all__ = ["footprint_options"]

# by the name of the field of `Stated` that an option fills
_OPTIONS: dict[str, Any] = {
    "pue": Annotated[
        str | None,
        typer.Option(metavar="X|NAME", help="Facility energy over IT energy, or a provider's.", show_default=False),
    ],
    "cooling": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="air, liquid or immersion: its range of PUE.", show_default=False),
    ],
    "grid": Annotated[
        str | None,
        typer.Option(
            metavar="ZONE|G_PER_KWH|FILE",
            help="Where it ran: a country (DE, DEU, Germany), a US eGRID subregion, g/kWh, or a series by time.",
            show_default=False,
        ),
    ],
    "market": Annotated[
        float | None, typer.Option(metavar="G_PER_KWH", help="The electricity contract's factor.", show_default=False)
    ],
    "wue": Annotated[
        list[str] | None,
        typer.Option(
            metavar="X|NAME",
            help="Litre of water a kWh of IT energy the site consumes; withdrawn=X; or a provider's. Repeatable.",
            show_default=False,
        ),
    ],
    "price": Annotated[float | None, typer.Option(metavar="X", help="Price of a device-hour.", show_default=False)],
    "price_kwh": Annotated[
        str | None, typer.Option(metavar="X|FILE", help="Price of a kWh, or prices by time.", show_default=False)
    ],
    "lifetime": Annotated[
        float | None, typer.Option(metavar="YEARS", help="Service life of the hardware.", show_default=False)
    ],
    "utilisation": Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of its life the hardware works.", show_default=False),
    ],
    "plain": Annotated[bool, typer.Option("--plain", help="Plain equivalents too.")],
}


def footprint_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options, those named `without` left out, in place of its parameter `said: Stated`."""
    options = {name: annotation for name, annotation in _OPTIONS.items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            from moe.energy.footprint import Stated

            stated = {name: given.pop(name) for name in options}
            command(**given, said=Stated(**stated | {"wue": tuple(stated["wue"] or ())}))

        own = inspect.signature(command)
        parameters = [parameter for parameter in own.parameters.values() if parameter.name != "said"]
        for name, annotation in options.items():
            default = False if name == "plain" else None
            parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            parameters.append(parameter)
        # what typer reads the options of a command from
        with_options.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate
