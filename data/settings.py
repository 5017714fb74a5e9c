"""Settings: types with bounds, checks, and the command line.

A setting is a field of a dataclass. Its type holds its bounds:

    steps: Positive = setting(80, "training steps")

`check_settings` holds every value against its type and bounds, wherever the value came from: the
command line or a saved config.json. So nan, inf and numbers beyond 10^9 get in nowhere.

Left out: configuration files, and settings from environment variables.

Try it alone:  python -m data.settings    # what some values are refused for
"""

from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from data.faults import UserError

# -------------------------------------------------------------------------------- types with bounds

HUGE = 10**9  # no setting needs more; 10^30 overflows somewhere far from here


@dataclass(frozen=True)
class Bounds:
    """The numbers from low to high. above: low itself is not one of them."""

    low: float
    high: float = HUGE
    above: bool = False

    def hold(self, value: float) -> bool:
        """False for nan too: it compares with nothing."""
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self):
        return f"{'above' if self.above else 'at least'} {self.low} and at most {self.high}"


Positive = Annotated[int, Bounds(1)]
NotNegative = Annotated[int, Bounds(0)]
Amount = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1, above=True)]
Temperature = Annotated[float, Bounds(0.01)]  # below, logits overflow and vLLM rounds up


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


# ----------------------------------------------------------------------------------------- checking


def check_settings(settings, source: str = "") -> None:
    """Raises UserError for the first value of a dataclass that is none of its type. source: where
    they are from."""
    kinds = get_type_hints(type(settings), include_extras=True)
    for f in fields(settings):
        complaint = complaint_about(getattr(settings, f.name), kinds[f.name])
        if complaint:
            raise UserError(f"{source}--{f.name} {complaint}")


def complaint_about(value, kind) -> str | None:
    """What is wrong with a value of a type: `must be at least 1 and at most 10, not 0`, or None."""
    if get_origin(kind) is Union:  # Optional: a type, or None
        kind, _ = get_args(kind)
        if value is None:
            return None
    bounds = None
    if get_origin(kind) is Annotated:
        kind, bounds = get_args(kind)
    shown = f"not {value!r:.60}"
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"must be one of {', '.join(choices)}, {shown}"
    if type(value) is not kind and not (kind is float and type(value) is int):
        return f"must be of type {kind.__name__}, {shown}"
    if bounds and not bounds.hold(value):
        return f"must be {bounds}, {shown}"
    if kind is str and not (value and value.isprintable()):
        return f"must be printable text, {shown}"
    return None


# ------------------------------------------------------------------------------------- command line


class Help(ArgumentDefaultsHelpFormatter):
    """Prints a default once; where the default is unset, the help text says what that means."""

    def _get_help_string(self, action):
        if action.option_strings[0].startswith("--no_"):
            return "the same with false"
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Reports a command line that is wrong in one line, like any other fault."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help lists all settings")


def read_command_line(groups: tuple, description: str, argv: list[str]) -> dict:
    """Every setting of some dataclasses: name -> its value on the command line, or its default."""
    parser = Parser(groups, description=description, allow_abbrev=False, formatter_class=Help)
    *read, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r:.60}; --help lists all")
    settings = {}
    for group in read:
        settings |= asdict(group)
    return settings


def given(argv: list[str]) -> set[str]:
    """Names of the settings on a command line."""
    names = set()
    for arg in argv:
        if arg.startswith("--"):
            name = arg.split("=")[0].removeprefix("--").replace("-", "_")
            names.add(name.removeprefix("no_"))
    return names


def demo() -> None:
    """Prints the complaint about some values."""
    for kind, values in ((Positive, (1, 0, 10**30, "1")), (Share, (0.5, 0.0, float("nan")))):
        for value in values:
            print(f"{value!r}: {complaint_about(value, kind) or 'fine'}")


if __name__ == "__main__":
    demo()
