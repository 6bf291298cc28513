"""`lrs-edge scenes`: large question-answer scenes from labelled tiles."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrs_edge.commands.common import debug_option, write_result

if TYPE_CHECKING:
    from rich.progress import Progress

    from lrs_edge_export.scenes.rules import SceneRules
    from lrs_edge_export.scenes.write import SceneProgress


def _size(text: str) -> tuple[int, int]:
    """(width, height) from `8000` for a square, or from `12000x8000`."""
    found = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text.strip().lower())
    if found is None:
        raise click.BadParameter(f"{text!r} is neither a side such as 8000 nor 12000x8000")
    width = int(found[1])
    return width, int(found[2] or width)


def _labels(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> Any:
    """Groups of labels from `farmland,meadow`, given any number of times."""
    groups = [[part.strip().lower() for part in value.split(",")] for value in values]
    if any(not label for group in groups for label in group):
        raise click.BadParameter("give labels separated by commas, such as farmland,meadow")
    return tuple(tuple(group) for group in groups)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    metavar="OUT",
    help="Folder of the scenes; one that a run with the same options left unfinished is finished.",
)
@click.option(
    "--count", type=click.IntRange(1), default=20, show_default=True, help="How many scenes."
)
@click.option(
    "--size",
    "sizes",
    type=_size,
    multiple=True,
    default=("8000",),
    show_default=True,
    metavar="SIDE|WxH",
    help="Of scenes in pixels; given several times, scenes take the sizes in turn.",
)
@click.option(
    "--questions",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Questions on each scene, where it offers as many.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME",
    help="Use tiles of this split only; may be given several times. Default: all tiles.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every choice.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["cog", "tif"]),
    default="cog",
    show_default=True,
    help="Cloud-optimised GeoTIFF with overviews, or GeoTIFF without.",
)
@click.option(
    "--compression",
    type=click.Choice(["jpeg", "deflate"]),
    default="jpeg",
    show_default=True,
    help="Of the pixels; deflate loses nothing and takes several times the space.",
)
@click.option(
    "--quality",
    type=click.IntRange(50, 100),
    default=90,
    show_default=True,
    help="Of JPEG compression.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="Ask only questions of this kind (presence, count, category, position, 'rural/urban "
    "classification', beside); may be given several times.",
)
@click.option(
    "--rural",
    callback=_labels,
    multiple=True,
    metavar="LABELS",
    help="Labels, separated by commas, that may lie beside each other in a rural background; "
    "several times for several groups. Default: classes of AID.",
)
@click.option(
    "--urban",
    callback=_labels,
    multiple=True,
    metavar="LABELS",
    help="The same for an urban background.",
)
@click.option(
    "--name",
    default="scenes",
    show_default=True,
    help="Begins file names and question ids; scorers take it for the name of the data set.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing on stderr.")
@debug_option
def scenes(
    folder: Path,
    target: Path,
    count: int,
    sizes: tuple[tuple[int, int], ...],
    questions: int,
    splits: tuple[str, ...],
    seed: int,
    image_format: str,
    compression: str,
    quality: int,
    kinds: tuple[str, ...],
    rural: tuple[tuple[str, ...], ...],
    urban: tuple[tuple[str, ...], ...],
    name: str,
    quiet: bool,
) -> None:
    """Make large scenes with questions from the labelled tiles in FOLDER.

    FOLDER has a labels.jsonl whose lines name a file, its width and height, its scene (the label)
    and its split. OUT gets the images, questions.jsonl in the format of LRS-VQA, and scenes.json,
    which says what every scene was made of.
    """
    from lrs_edge_export.scenes.geotiff import Encoding
    from lrs_edge_export.scenes.library import read_library
    from lrs_edge_export.scenes.write import SceneSetOptions, write_scenes

    library = read_library(folder, splits or None)
    options = SceneSetOptions(
        count=count,
        sizes=sizes,
        questions=questions,
        seed=seed,
        name=name,
        kinds=tuple(sorted(set(kinds))) or None,
        splits=tuple(sorted(set(splits))) or None,
        encoding=Encoding(
            "cog" if image_format == "cog" else "tif",
            "jpeg" if compression == "jpeg" else "deflate",
            quality,
        ),
    )
    with _Display(quiet=quiet) as display:
        made = write_scenes(library, target, options, _rules(rural, urban), display.update)
    there = "" if made.made == made.scenes else f" ({made.scenes - made.made} were there already)"
    write_result(f"{made.folder}: {made.scenes} scenes{there}, {made.questions} questions\n", None)


def _rules(rural: tuple[tuple[str, ...], ...], urban: tuple[tuple[str, ...], ...]) -> SceneRules:
    """The usual rules; where a background is named, both settings are as named."""
    from lrs_edge_export.scenes.rules import DEFAULT_RULES, SceneRules

    return SceneRules(rural=rural, urban=urban) if rural or urban else DEFAULT_RULES


class _Display:
    """A bar on a terminal, one line per scene elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None
        self._told = -1
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("planning scenes", total=None)

    def __enter__(self) -> _Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: SceneProgress) -> None:
        """Show how far the run is."""
        if self._quiet:
            return
        if self._bar is not None:
            done = progress.scene + progress.share
            shown = f"drawing {progress.name}"
            self._bar.update(self._task, description=shown, completed=done, total=progress.scenes)
        else:
            self._line(progress)

    def _line(self, progress: SceneProgress) -> None:
        if progress.scene != self._told:
            self._told = progress.scene
            click.echo(f"scene {progress.scene + 1}/{progress.scenes}: {progress.name}", err=True)
