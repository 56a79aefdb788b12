"""Text from files and machines, made unable to steer the terminal it is printed on."""

__all__ = ["printable"]


def printable(text: str) -> str:
    """The text with everything but its line ends and printable characters replaced."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
