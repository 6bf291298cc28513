"""What the commands share: options, value types, and writing to the terminal and to files."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from lrs_edge.errors import ExportError, LrsEdgeError, UsageError
from lrs_edge.files import check_replaceable, refuse_address, replacing

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

#: Decorator that adds `-q`, for commands that tell of their progress.
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, is_eager=True, help="Nothing on standard error but errors."
)


class GroupedCommand(click.Command):
    """A command whose help lists its options in groups: what most need first, research last."""

    #: Names of options under the title they are listed under; all others come first.
    groups: ClassVar[dict[str, frozenset[str]]] = {
        "Budgets": frozenset(
            {
                "max_tiles",
                "tiles_per_level",
                "max_vision_tokens",
                "kv_budget",
                "kv_cache",
                "timeout",
                "max_tokens",
            }
        ),
        "Raster": frozenset(
            {"bands", "value_range", "crs", "transparency", "orientation", "page", "resampling"}
        ),
        "Research": frozenset(
            {"policy", "search", "prune", "prune_ratio", "prune_layers", "end_str", "trace"}
        ),
    }

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, one section for each group that has any."""
        sections: dict[str, list[tuple[str, str]]] = {"Common": [], **{t: [] for t in self.groups}}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                named = (title for title, names in self.groups.items() if param.name in names)
                sections[next(named, "Common")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


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


class ImagePath(click.Path):
    """A path of an image. Addresses are refused as they were typed: a `Path` loses a slash."""

    def __init__(self) -> None:
        # Click would call a file without read permission a usage error.
        super().__init__(path_type=Path, readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.Path` does.

        Raises:
            ImageError: The value is a URL or a GDAL virtual path.
        """
        refuse_address(os.fsdecode(value))
        return super().convert(value, param, ctx)


class BundlePath(click.Path):
    """A bundle: its folder, or the name of a model in the user's folder of models."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.Path` does; a model's name becomes its folder."""
        from lrs_edge.transfer.folder import find_bundle

        return find_bundle(Path(os.fsdecode(super().convert(value, param, ctx))))


#: Decorator that adds `--crs`.
crs_option = click.option(
    "--crs",
    metavar="CRS",
    help="Coordinate reference system of the image's position, such as EPSG:32632, where its world "
    "file or header does not say it.",
)

#: Decorators that add `--transparency`, `--orientation` and `--page`; None where not given.
view_options = (
    click.option(
        "--transparency",
        type=click.Choice(["auto", "apply", "ignore"]),
        help="What hides pixels. auto (default): alpha, masks and nodata, but no band marked as "
        "alpha that holds data; apply: that one too; ignore: nothing.",
    ),
    click.option(
        "--orientation",
        type=click.Choice(["exif", "stored"]),
        help="exif turns photographs as their files ask; stored does not. Default: exif; "
        "under --policy reference, stored.",
    ),
    click.option(
        "--page",
        type=click.IntRange(min=1),
        metavar="N",
        help="Which image of a TIFF that holds several, from 1; default: the largest.",
    ),
)
VIEW_NAMES = ("transparency", "orientation", "page")


def take_view(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the values of `view_options` from a command's values; those that were given."""
    taken = {name: values.pop(name) for name in VIEW_NAMES}
    return {name: value for name, value in taken.items() if value is not None}


def printable(text: str) -> str:
    """Text without control characters, so that no file name or answer can steer the terminal."""
    return "".join(
        char for char in text if char in "\n\t" or char.isprintable() or char == "\u200d"
    )


@contextmanager
def export_packages(doing: str) -> Iterator[None]:
    """Around imports of `lrs_edge_export`: says what to install where a package is missing.

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


def check_checkpoint(name: str) -> None:
    """Refuse what cannot be a checkpoint, while nothing that is slow or large is imported yet.

    Raises:
        ExportError: See `lrs_edge_export.families.recipes.check_name`.
    """
    from lrs_edge_export.families.recipes import check_name

    check_name(name)


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
    """Refuse an output file that cannot be written, before any work is done.

    Raises:
        UsageError: Its directory does not exist or cannot be written to, its name cannot be a
            file's, it is a directory, or it is one of the inputs.
    """
    if output is None:
        return
    if os.path.isdir(output):
        raise UsageError(f"{output} is a directory; name a file to write")
    if not os.path.isdir(output.parent):
        raise UsageError(f"{output.parent} does not exist; create it before writing {output.name}")
    for path in inputs:
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise UsageError(f"{output} is an input; writing there would destroy it")
    try:
        check_replaceable(output)
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written ({error.strerror}); name a file in a folder that can"
        ) from error


def write_result(text: str, output: Path | None) -> None:
    """Write a result to stdout, or as a whole to a file that is replaced in one step.

    Raises:
        LrsEdgeError: The file cannot be written; what was there before is left as it was, and the
            result goes to stdout, so that the work is not lost.
    """
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        # What was written to stdout before comes first where the file is /dev/stdout.
        sys.stdout.flush()
        with replacing(output) as stream:
            stream.write(text.encode(errors="replace"))
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        click.echo(text, nl=False)
        raise LrsEdgeError(
            f"{output} cannot be written ({error.strerror}); the result is on standard output"
        ) from error


def write_json(facts: object) -> None:
    """Write facts to stdout as indented JSON; numbers that JSON does not know become null."""
    import msgspec

    write_result(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode() + "\n", None)


def restrict_image_formats() -> None:
    """Closes all of GDAL that images do not need, where the process is the command's own."""
    context = click.get_current_context(silent=True)
    if context is not None and (context.obj or {}).get(OWNS_PROCESS_KEY):
        from lrs_edge.raster.gdal_env import restrict_drivers

        restrict_drivers()
