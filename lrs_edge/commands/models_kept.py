"""Commands of `lrs-edge models` over the user's folder: list, pull, pack, unpack, remove."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lrs_edge.commands.common import (
    BundlePath,
    check_output,
    debug_option,
    format_option,
    printable,
    step_teller,
    write_json,
    write_result,
)
from lrs_edge.errors import LrsEdgeError, UsageError

if TYPE_CHECKING:
    from lrs_edge.transfer.folder import Model
    from lrs_edge.transfer.pull import PullOptions

Decorated = TypeVar("Decorated", bound=Callable[..., object])

#: Options of what brings a bundle into the folder.
_COMING_OPTIONS = (
    click.option(
        "--name",
        default="",
        metavar="NAME",
        help="What the model is called here; default: the last part of what is named.",
    ),
    click.option(
        "--manifest-sha256",
        default="",
        metavar="HEX",
        help="Refuse any bundle but that whose manifest.json has this SHA-256 (as `models list "
        "--format json` shows it).",
    ),
    click.option(
        "--max-size",
        type=click.FloatRange(min=0, min_open=True, max=1e6),
        default=64,
        show_default=True,
        metavar="GB",
        help="Refuse a bundle of more gigabytes.",
    ),
)


def _coming_options(command: Decorated) -> Decorated:
    for option in reversed(_COMING_OPTIONS):
        command = option(command)
    return command


def _options(values: dict[str, Any], **more: bool) -> PullOptions:
    from lrs_edge.transfer.pull import PullOptions

    return PullOptions(
        name=values["name"],
        max_bytes=int(values["max_size"] * 1e9),
        manifest_sha256=values["manifest_sha256"],
        **more,
    )


@click.command("list")
@format_option("text", "json")
@debug_option
def list_models(output_format: str) -> None:
    """Show the embedded model and those in the folder of models.

    `verified` is when all hashes of a model held, where no file has changed since by size and time
    (`lrs-edge models verify NAME` looks at every byte again).
    """
    from lrs_edge.transfer.folder import all_models

    found = all_models()
    if output_format == "json":
        write_json([dataclasses.asdict(model) for model in found])
    else:
        write_result(printable("\n".join(_lines(found))) + "\n", None)


def _lines(found: list[Model]) -> list[str]:
    rows = [("name", "MB", "verified", "source", "licence")]
    for model in found:
        if model.problem:
            rows.append((model.name, "-", "no", model.source, f"not a bundle: {model.problem}"))
        else:
            when = (model.verified or "no").partition("T")[0]
            size = f"{model.size / 1e6:.0f}"
            rows.append((model.name, size, when, model.source or "-", model.licence))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  "
        f"{row[3]:<{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]


@click.command("pull")
@click.argument("source", metavar="PATH|URL|ORG/NAME")
@_coming_options
@click.option(
    "--offline",
    is_flag=True,
    envvar=["LRS_EDGE_OFFLINE", "HF_HUB_OFFLINE"],
    show_envvar=True,
    help="Look nowhere but on this machine.",
)
@click.option(
    "--insecure-http",
    is_flag=True,
    help="Take http from other machines, too: anybody on the way can read and change it.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
@debug_option
def pull_model(source: str, offline: bool, insecure_http: bool, quiet: bool, **values: Any) -> None:
    """Put a bundle into the folder of models; prints its name, for `--model NAME`.

    It is a bundle's folder or a packed one (.tar) on this machine, an https address of either,
    or ORG/NAME or ORG/NAME@REVISION of a Hugging Face repository that holds a bundle (HF_TOKEN
    where it is private). A download that broke off goes on when the command is run again. The
    bundle appears when every file has the manifest's SHA-256, or not at all: exit code 4.
    """
    from lrs_edge.transfer.pull import pull

    options = _options(values, offline=offline, insecure=insecure_http)
    place = pull(source, options, step_teller(quiet=quiet))
    write_result(printable(f"{place.name}\n"), None)


@click.command("pack")
@click.argument("bundle", type=BundlePath())
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write, such as NAME.tar.",
)
@click.option("-q", "--quiet", is_flag=True, help="Do not say the manifest's SHA-256.")
@debug_option
def pack_model(bundle: Path, output: Path, quiet: bool) -> None:
    """Write a bundle as one file, to carry it to another machine.

    BUNDLE is a directory, or a name of `lrs-edge models list`. It is verified first. The same
    bundle gives the same bytes. Prints the file's SHA-256 as sha256sum does.
    """
    from lrs_edge.transfer.archive import pack

    check_output(output)
    if output.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"{output} lies in the bundle itself; name a file elsewhere")
    packed = pack(bundle, output)
    step_teller(quiet=quiet)(
        f"{packed.size:,} bytes; --manifest-sha256 {packed.manifest_sha256} takes this bundle only"
    )
    write_result(printable(f"{packed.sha256}  {output}\n"), None)


@click.command("unpack")
@click.argument("file", type=click.Path(path_type=Path))
@_coming_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to make of it, in place of one in the folder of models.",
)
@debug_option
def unpack_file(file: Path, output: Path | None, **values: Any) -> None:
    """Put the bundle of a packed FILE into the folder of models; prints its name.

    With --output it prints the folder. Nothing but the files of its manifest is written, and it
    appears when each has the manifest's SHA-256, or not at all: exit code 4.
    """
    from lrs_edge.transfer.pull import unpack_model

    if output is not None and values["name"]:
        raise UsageError("--name is for the folder of models; with --output it has no meaning")
    place = unpack_model(file, _options(values), output)
    write_result(printable(f"{place.name if output is None else output}\n"), None)


@click.command("remove")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@debug_option
def remove_model(name: str, yes: bool) -> None:
    """Remove a model from the folder of models, and nothing else."""
    from lrs_edge.transfer.folder import removable, remove

    path = removable(name)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{path} is removed with --yes only, where nobody can be asked")
        if not click.confirm(printable(f"Remove {path}?"), err=True):
            raise LrsEdgeError(f"{path} is left where it is")
    remove(name)
