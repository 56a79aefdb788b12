"""The options that state factors of a footprint: the same for every command that prints carbon, water or money."""

from typing import Annotated

import typer

__all__ = ["Cooling", "Grid", "Lifetime", "Market", "Plain", "Price", "PriceKwh", "Pue", "Utilisation", "Wue"]

Pue = Annotated[
    str | None,
    typer.Option(metavar="X|NAME", help="Facility energy over IT energy, or a provider's.", show_default=False),
]
Cooling = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="air, liquid or immersion: its range of PUE.", show_default=False),
]
Grid = Annotated[
    str | None,
    typer.Option(
        metavar="ZONE|G_PER_KWH|FILE",
        help="Where it ran: a country (DE, DEU, Germany), a US eGRID subregion, g/kWh, or a series by time.",
        show_default=False,
    ),
]
Market = Annotated[
    float | None, typer.Option(metavar="G_PER_KWH", help="The electricity contract's factor.", show_default=False)
]
Wue = Annotated[
    list[str] | None,
    typer.Option(
        metavar="X|NAME",
        help="Litre of water a kWh of IT energy the site consumes; withdrawn=X; or a provider's. Repeatable.",
        show_default=False,
    ),
]
Price = Annotated[float | None, typer.Option(metavar="X", help="Price of a device-hour.", show_default=False)]
PriceKwh = Annotated[
    str | None, typer.Option(metavar="X|FILE", help="Price of a kWh, or prices by time.", show_default=False)
]
Lifetime = Annotated[
    float | None, typer.Option(metavar="YEARS", help="Service life of the hardware.", show_default=False)
]
Utilisation = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of its life the hardware works.", show_default=False),
]
Plain = Annotated[bool, typer.Option("--plain", help="Plain equivalents too.")]
