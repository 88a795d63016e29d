"""The flags of a command for the arguments of a function, whose defaults are theirs."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vmamba.errors import UserError, unknown
from vmamba.extensions import import_modules
from vmamba.runtime.cli import exit_code


def whole(at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes a whole number."""
    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < at_least or (at_most is not None and int(text) > at_most):
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number {bounds}")
        return int(text)

    return parse


def place(text: str) -> tuple[float, float]:
    """ "x,y", shares of an image's sides."""
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no place; give two numbers such as 0.5,0.3") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"'{text}' is outside the image; x and y are shares of it, from 0 to 1")
    return x, y


def share(text: str) -> float:
    """The type of a flag that takes a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 0 to 1")
    return number


def above_zero(text: str) -> float:
    """The type of a flag that takes a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return number


def or_word(word: str, type_: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of a flag that takes `word`, which stands for None, or else what `type_` does."""

    def parse(text: str) -> Any:
        try:
            return None if text == word else type_(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor {word}") from None

    return parse


side = whole(1, 2**15)  # of an image, pixels

_SHARED: dict[str, dict[str, Any]] = {  # flags of several commands
    "--model": dict(help="of vmamba.list_models()"),
    "--models": dict(nargs="+", metavar="MODEL", help="of vmamba.list_models() or timm's"),
    "--size": dict(type=side, metavar="PIXELS", help="side of the image"),
    "--sizes": dict(type=side, nargs="+", metavar="PIXELS", help="sides of the images"),
    "--device": dict(help="cpu, cuda, cuda:1, ...; auto: the GPU where there is one"),
    "--output": dict(metavar="DIR", help="folder for what is written"),
    "--page": dict(metavar="FILE", help="put the table between its <!-- table --> and <!-- end --> (default: none)"),
}


class _Import(argparse.Action):
    """Imports the modules as soon as they are read."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            import_modules(values)
        except UserError as error:
            parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """The flags of a command for the arguments of `function`.

    What is wrong on the command line ends the program with one sentence and status 2.

    Args:
        resumes: as of `exit_code`.
    """

    def __init__(self, function: Callable[..., object], description: str | None, resumes: bool = False):
        self.function, self.resumes = function, resumes
        self.flags = ["--help"]
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def flag(self, name: str, argument: str | None = None, **settings: Any) -> None:
        """Add a flag, or an argument without one where `name` has no hyphens.

        Args:
            name: of one in `_SHARED`, or of any other with `settings` as argparse takes them.
            argument: of the function, where it has another name.
        """
        settings = _SHARED.get(name, {}) | settings
        argument = argument or name.lstrip("-").replace("-", "_")
        default = inspect.signature(self.function).parameters[argument].default
        if default is not inspect.Parameter.empty:
            settings["default"] = default
            if isinstance(default, (list, tuple)):
                shown = (" " if "nargs" in settings else ",").join(map(str, default))
            else:
                shown = default
            if "(default:" not in settings["help"] and shown not in ("", None, False):
                settings["help"] += f" (default: {shown})"
        if name.startswith("-"):
            settings["dest"] = argument
            self.flags.append(name)
        self.add_argument(name, **settings)

    def imports(self) -> None:
        """Add --import, for what a module of the user's own registers."""
        self.flags.append("--import")
        self.add_argument(
            "--import",
            action=_Import,
            nargs="+",
            metavar="MODULE",
            default=argparse.SUPPRESS,  # no argument of the function
            help="modules of your own, to import first, as a checkpoint's model needs (default: none)",
        )

    def run(self, arguments: Sequence[str] | None = None) -> NoReturn:
        """Call the function with the arguments of the command line, or these, and end the process."""
        args = vars(self.parse_args(arguments))
        sys.exit(exit_code(lambda: self.function(**args), self.resumes))

    def parse_args(self, args=None, namespace=None):
        parsed, extra = self.parse_known_args(args, namespace)
        for arg in extra:
            if arg.startswith("-"):
                self.error(str(unknown("flag", arg.partition("=")[0], self.flags)))
            self.error(f"unexpected argument '{arg}'; --help lists what there is")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")
