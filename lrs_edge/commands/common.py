"""What the commands share: options, value types, and writing to the terminal and to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

from lrs_edge.errors import ExportError, LrsEdgeError, UsageError
from lrs_edge.files import replacing

#: Set in the root context's `obj` by `--debug`.
DEBUG_KEY = "debug"
#: As `DEBUG_KEY`, for whether the process is the command's own.
OWNS_PROCESS_KEY = "owns_process"

Decorated = TypeVar("Decorated", bound=Callable[..., object])
Number = TypeVar("Number", int, float)


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    flags = ctx.find_root().obj
    if value and isinstance(flags, dict):
        flags[DEBUG_KEY] = True


#: Decorator that adds `--debug`.
debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the traceback of an error.",
)


def format_option(*choices: str) -> Callable[[Decorated], Decorated]:
    """Decorator that adds `--format`; the first choice is the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help="Form of the output.",
    )


def number_list(kind: type[Number], counts: tuple[int, ...]) -> Callable[[str], tuple[Number, ...]]:
    """A click type: numbers separated by commas, such as `4,3,2`.

    Args:
        kind: int or float.
        counts: How many there may be.
    """

    def convert(text: str) -> tuple[Number, ...]:
        try:
            numbers = tuple(kind(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in counts:
            listed = " or ".join(str(count) for count in counts)
            noun = "whole numbers" if kind is int else "numbers"
            raise click.BadParameter(f"{text!r} is not {listed} {noun} separated by commas")
        return numbers

    return convert


#: Decorator that adds `--bands`.
bands_option = click.option(
    "--bands",
    type=number_list(int, (1, 3)),
    metavar="R,G,B",
    help="Bands shown as red, green and blue, counted from 1; one band for grey.",
)


def printable(text: str) -> str:
    """Text without control characters, so that no file name or answer can steer the terminal."""
    return "".join(
        char for char in text if char in "\n\t" or char.isprintable() or char == "\u200d"
    )


@contextmanager
def export_packages(doing: str) -> Iterator[None]:
    """Around imports of `lrs_edge.export`: says what to install where a package is missing.

    Args:
        doing: What needs it, such as "exporting".

    Raises:
        ExportError: A package outside lrs-edge is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lrs_edge"):
            raise
        raise ExportError(
            f"{doing} needs the package {error.name}, which is not installed; "
            "run, where lrs-edge was installed from: pip install '.[cpu,export]'"
        ) from error


def step_teller(*, quiet: bool) -> Callable[[str], None]:
    """Writes one line per step of a long command to standard error, or nothing."""

    def tell(step: str) -> None:
        if not quiet:
            click.echo(one_line(step), err=True)

    return tell


def one_line(text: str) -> str:
    """Text on one line, without control characters."""
    return printable(" ".join(text.split()))


def check_output(output: Path | None, *inputs: Path) -> None:
    """Refuse an output file that cannot be meant, before any work is done.

    Raises:
        UsageError: Its directory does not exist, it is a directory, or it is one of the inputs.
    """
    if output is None:
        return
    if output.is_dir():
        raise UsageError(f"{output} is a directory; name a file to write")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} does not exist; create it before writing {output.name}")
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise UsageError(f"{output} is an input; writing there would destroy it")


def write_result(text: str, output: Path | None) -> None:
    """Write a result to stdout, or as a whole to a file that is replaced in one step.

    Raises:
        LrsEdgeError: The file cannot be written; what was there before is left as it was.
    """
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        # A device or a named pipe is written to; replacing it by a file would be a nasty surprise.
        if output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8")
        else:
            with replacing(output.resolve()) as stream:
                stream.write(text.encode())
    except OSError as error:
        raise LrsEdgeError(f"{output} cannot be written ({error.strerror})") from error


def write_json(facts: object) -> None:
    """Write facts to stdout as indented JSON; numbers that JSON does not know become null."""
    import msgspec

    write_result(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode() + "\n", None)


def restrict_image_formats() -> None:
    """Closes all of GDAL that images do not need, where the process is the command's own."""
    context = click.get_current_context(silent=True)
    if context is not None and (context.obj or {}).get(OWNS_PROCESS_KEY):
        from lrs_edge.io.gdal_env import restrict_drivers

        restrict_drivers()
