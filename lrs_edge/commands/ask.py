"""`lrs-edge ask`: one question about one image."""

from __future__ import annotations

import codecs
import os
import string
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from lrs_edge.commands.common import (
    GroupedCommand,
    ImagePath,
    check_output,
    debug_option,
    format_option,
    printable,
    quiet_option,
    restrict_image_formats,
    take_view,
    write_result,
)
from lrs_edge.commands.search_options import (
    ask_options,
    check_value_range,
    engine_options,
    image_options,
    model_option,
    take_ask_options,
)
from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.requests.options import view_for

if TYPE_CHECKING:
    from lrs_edge.answer.answer import Answer
    from lrs_edge.answer.report import ImageFacts
    from lrs_edge.raster.raster import Raster
    from lrs_edge.requests.clock import Clock
    from lrs_edge.requests.options import AskOptions

#: Most bytes of a question that are read from standard input.
MAX_STDIN_BYTES = 1 << 20

#: Cut off a question's ends: what editors and shells leave there.
_AROUND = f"{string.whitespace}\ufeff\u00a0\u3000"

EXIT_TIMED_OUT = 6

#: Seconds that views for a report may take when the time limit is over.
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class AskArguments:
    """What the user typed, apart from the options of the search itself."""

    image: Path
    question: str
    bundle: Path | None
    output_format: str
    bands: tuple[int, ...] | None
    value_range: tuple[float, float] | None
    crs: str | None
    view: dict[str, Any]
    device: str
    threads: int | None
    kv_cache: str
    verify: bool
    trace: Path | None
    output: Path | None
    report: tuple[Path, ...]
    quiet: bool

    @property
    def streams(self) -> bool:
        """Whether the answer's text goes to standard output as it comes."""
        return self.output_format == "text" and self.output is None


@click.command(cls=GroupedCommand)
@click.argument("image", type=ImagePath())
@click.argument("question")
@model_option
@format_option("text", "json", "geojson")
@ask_options
@image_options
@engine_options
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Also write scores, tiles, kept tokens and logits of every stage.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the result to a file instead of standard output.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Also write the answer and what it rests on as a picture (.png), a page (.html) or a map "
    "(.geojson, .gpkg), by the file's ending. Can be given several times.",
)
@quiet_option
@debug_option
@click.pass_context
def ask(ctx: click.Context, /, **values: Any) -> None:
    """Ask QUESTION about IMAGE.

    The answer streams to standard output; progress and evidence go to standard error. QUESTION `-`
    is read from standard input.
    """
    if values["output"] == Path("-"):
        values["output"] = None
    options = take_ask_options(values)
    view = view_for(options.policy, take_view(values))
    typed = AskArguments(**values, view=view)
    check_value_range(typed.value_range)
    check_output(typed.output, typed.image)
    check_output(typed.trace, typed.image)
    if typed.trace is not None and typed.trace == typed.output:
        raise UsageError(f"--trace and --output both name {typed.trace}; name two files")
    _check_reports(typed)
    answer = _answer(typed, _question(typed.question), options)
    if answer.finish_reason == "timeout":
        ctx.exit(EXIT_TIMED_OUT)


def _check_reports(typed: AskArguments) -> None:
    """Refuse reports that cannot be written, or that name the file of something else."""
    from lrs_edge.reports.save import check_reports

    for path in typed.report:
        check_output(path, typed.image)
        for option, other in (("--output", typed.output), ("--trace", typed.trace)):
            if other is not None and os.path.realpath(other) == os.path.realpath(path):
                raise UsageError(f"--report and {option} both name {path}; name two files")
    check_reports(typed.report)


def _question(argument: str) -> str:
    """The question as typed, or as piped in; without white space and byte order mark around it."""
    if argument != "-":
        return argument.strip(_AROUND)
    # A program started without standard input has none at all.
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(
            f"the question on standard input is longer than {MAX_STDIN_BYTES} bytes; shorten it"
        )
    # PowerShell's `>` writes UTF-16.
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8").strip(_AROUND)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the question on standard input is not UTF-8 text ({error}); save it as UTF-8"
        ) from error


def _answer(typed: AskArguments, question: str, options: AskOptions) -> Answer:
    """Run the engine, and write the answer as it comes."""
    import lrs_edge
    from lrs_edge.answer import report
    from lrs_edge.commands.progress import ProgressDisplay
    from lrs_edge.reports.save import NOWHERE, check_places
    from lrs_edge.requests.clock import Clock

    restrict_image_formats()
    with (
        ProgressDisplay(enabled=not typed.quiet and _is_terminal(sys.stderr)) as display,
        lrs_edge.load(
            typed.bundle,
            device=typed.device,
            threads=typed.threads,
            kv_cache=typed.kv_cache,
            verify=typed.verify,
        ) as engine,
    ):
        clock = Clock(options.timeout)
        opened = engine.open(
            typed.image,
            bands=typed.bands,
            value_range=typed.value_range,
            crs=typed.crs,
            timeout=options.timeout,
            **typed.view,
        )
        with opened as scene:
            info = scene.raster.info
            size = (info.width, info.height)
            facts = report.ImageFacts(str(typed.image), *size, info.crs, info.gsd)
            if typed.output_format == "geojson":
                reason = info.unlocated or ("" if scene.can_be_placed() else NOWHERE)
                if reason:
                    raise UsageError(report.no_geojson(facts.path, reason))
            if typed.report:
                check_places(typed.report, scene.raster, scene.can_be_placed)
            stream = scene.stream(
                question,
                _less_time(options, clock),
                on_progress=display.update,
                trace=typed.trace,
            )
            for piece in stream:
                if typed.streams:
                    display.stop()
                    write_result(printable(piece), None)
            display.stop()
            _finish(typed, stream.answer, facts)
            _write_reports(typed, stream.answer, facts, scene.raster, clock)
    return stream.answer


def _write_reports(
    typed: AskArguments, answer: Answer, facts: ImageFacts, raster: Raster, clock: Clock
) -> None:
    """Write every report; one that cannot be written does not cost the others.

    Raises:
        LrsEdgeError: Of the first that cannot be.
    """
    from lrs_edge.reports.save import save_report
    from lrs_edge.reports.views import Views

    seconds = None if clock.deadline is None else max(clock.left, _LEAST_SECONDS)
    views = Views(raster, seconds)
    failed: LrsEdgeError | None = None
    for path in typed.report:
        try:
            save_report(answer, path, facts, views)
        except OSError as error:
            failed = failed or LrsEdgeError(
                f"the report {path} cannot be written ({error.strerror}); the answer stands above"
            )
    for note in () if typed.quiet else views.notes:
        click.echo(printable(f"Warning: {note}"), err=True)
    if failed is not None:
        raise failed


def _less_time(options: AskOptions, clock: Clock) -> AskOptions:
    """The options without the time that looking at the file took: it is the question's too."""
    if options.timeout is None:
        return options
    return replace(options, timeout=max(options.timeout - clock.elapsed, 0.01))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _finish(typed: AskArguments, answer: Answer, facts: ImageFacts) -> None:
    """Write what is written when the whole answer is there."""
    from lrs_edge.answer import report

    if typed.streams:
        write_result(f"{report.mark(answer)}\n", None)
    elif typed.output_format == "text":
        write_result(f"{printable(answer.text)}{report.mark(answer)}\n", typed.output)
    elif typed.output_format == "json":
        write_result(report.to_json(answer, facts), typed.output)
    else:
        write_result(report.to_geojson(answer, facts), typed.output)
    if typed.output_format == "text" and not typed.quiet:
        click.echo(printable(report.evidence(answer)), err=True, nl=False)
