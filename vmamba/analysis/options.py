"""Types of command-line values that the doors of `analyze/` share."""

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def place(text: str) -> tuple[float, float]:
    """ "x,y", two numbers."""
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is no place; give two numbers such as 0.5,0.3") from None
    return x, y
