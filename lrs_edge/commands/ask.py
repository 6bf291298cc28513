"""`lrs-edge ask`: one question about one image."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from lrs_edge.commands.common import (
    bands_option,
    check_output,
    debug_option,
    format_option,
    number_list,
    printable,
    write_result,
)
from lrs_edge.errors import UsageError
from lrs_edge.options import AskOptions

if TYPE_CHECKING:
    from lrs_edge.answer import Answer
    from lrs_edge.report import ImageFacts

#: Most bytes of a question that are read from standard input.
MAX_STDIN_BYTES = 1 << 20

EXIT_TIMED_OUT = 6

_AT_LEAST_ONE = click.IntRange(min=1)


@dataclass(frozen=True)
class Request:
    """What the user typed, apart from the options of the search itself."""

    image: Path
    question: str
    bundle: Path | None
    output_format: str
    bands: tuple[int, ...] | None
    value_range: tuple[float, float] | None
    provider: str
    threads: int | None
    verify: bool
    trace: Path | None
    output: Path | None
    quiet: bool

    @property
    def streams(self) -> bool:
        """Whether the answer's text goes to standard output as it comes."""
        return self.output_format == "text" and self.output is None


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option(
    "-m",
    "--model",
    "bundle",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Bundle directory; the embedded model when left out.",
)
@format_option("text", "json", "geojson")
@click.option(
    "--policy",
    type=click.Choice(["full", "reference"]),
    default="full",
    show_default=True,
    help="full searches to the original resolution; reference does what the authors' code does.",
)
@click.option(
    "--resampling",
    type=click.Choice(["area", "reference"]),
    default="area",
    show_default=True,
    help="area averages through overviews; reference is bilinear without antialiasing.",
)
@click.option("--max-tiles", type=_AT_LEAST_ONE, metavar="N", help="Most tiles looked at.")
@click.option(
    "--tiles-per-level",
    type=_AT_LEAST_ONE,
    default=AskOptions.tiles_per_level,
    show_default=True,
    metavar="N",
    help="Most tiles looked at in one level finer than the base.",
)
@click.option(
    "--max-vision-tokens",
    type=_AT_LEAST_ONE,
    metavar="N",
    help="Most vision tokens given to the language model.",
)
@click.option(
    "--kv-budget",
    type=_AT_LEAST_ONE,
    metavar="N",
    help="Most tokens left in the language model's KV cache after prefill.",
)
@click.option(
    "--timeout",
    type=float,
    metavar="SECONDS",
    help="Cut the answer short after this time; exit code 6 where that happens.",
)
@click.option(
    "--max-tokens",
    type=_AT_LEAST_ONE,
    default=AskOptions.max_tokens,
    show_default=True,
    metavar="N",
    help="Most tokens generated.",
)
@click.option(
    "--temperature",
    type=float,
    default=AskOptions.temperature,
    show_default=True,
    metavar="T",
    help="0 for greedy decoding.",
)
@click.option(
    "--top-p",
    type=float,
    default=AskOptions.top_p,
    show_default=True,
    metavar="P",
    help="Nucleus of sampled decoding.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=AskOptions.seed,
    show_default=True,
    metavar="N",
    help="Seed of sampled decoding.",
)
@click.option(
    "--end-str",
    default=AskOptions.end_str,
    metavar="TEXT",
    help="Instruction put on a line after the question.",
)
@bands_option
@click.option(
    "--range",
    "value_range",
    type=number_list(float, (2,)),
    metavar="LO,HI",
    help="Pixel values shown as black and white, in place of the 2 % stretch.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the engines run.",
)
@click.option("--threads", type=_AT_LEAST_ONE, metavar="N", help="Threads of one operation.")
@click.option(
    "--no-verify",
    "verify",
    flag_value=False,
    default=True,
    type=bool,
    help="Skip the hashes of the bundle's large files.",
)
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
@click.option("-q", "--quiet", is_flag=True, help="Nothing on standard error but errors.")
@debug_option
@click.pass_context
def ask(ctx: click.Context, /, **values: Any) -> None:
    """Ask QUESTION about IMAGE.

    The answer streams to standard output; progress and evidence go to standard error. QUESTION `-`
    is read from standard input.
    """
    if values["output"] == Path("-"):
        values["output"] = None
    options = AskOptions(**{field.name: values.pop(field.name) for field in fields(AskOptions)})
    request = Request(**values)
    if request.value_range is not None and not request.value_range[0] < request.value_range[1]:
        raise UsageError("--range takes two numbers, the lower one first, such as 0,3000")
    check_output(request.output, request.image)
    check_output(request.trace, request.image)
    if request.trace is not None and request.trace == request.output:
        raise UsageError(f"--trace and --output both name {request.trace}; name two files")
    answer = _answer(request, _question(request.question), options)
    if answer.finish_reason == "timeout":
        ctx.exit(EXIT_TIMED_OUT)


def _question(argument: str) -> str:
    """The question as typed, or as piped in."""
    if argument != "-":
        return argument
    # A program started without standard input has none at all.
    data = b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise UsageError(f"the question on standard input is longer than {MAX_STDIN_BYTES} bytes")
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"the question on standard input is not UTF-8 text ({error})") from error


def _answer(request: Request, question: str, options: AskOptions) -> Answer:
    """Run the engine, and write the answer as it comes."""
    import lrs_edge
    from lrs_edge import report
    from lrs_edge.commands.progress import ProgressDisplay

    with (
        ProgressDisplay(enabled=not request.quiet and _is_terminal(sys.stderr)) as display,
        lrs_edge.load(
            request.bundle,
            provider=request.provider,
            threads=request.threads,
            verify=request.verify,
        ) as engine,
        engine.open(request.image, bands=request.bands, value_range=request.value_range) as scene,
    ):
        info = scene.raster.info
        facts = report.ImageFacts(str(request.image), info.width, info.height, info.crs, info.gsd)
        if request.output_format == "geojson" and info.crs is None:
            raise UsageError(report.no_georeference(facts.path))
        stream = scene.stream(question, options, on_progress=display.update, trace=request.trace)
        for piece in stream:
            if request.streams:
                display.stop()
                write_result(printable(piece), None)
    _finish(request, stream.answer, facts)
    return stream.answer


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _finish(request: Request, answer: Answer, facts: ImageFacts) -> None:
    """Write what is written when the whole answer is there."""
    from lrs_edge import report

    if request.streams:
        write_result("\n", None)
    elif request.output_format == "text":
        write_result(printable(answer.text) + "\n", request.output)
    elif request.output_format == "json":
        write_result(report.to_json(answer, facts), request.output)
    else:
        write_result(report.to_geojson(answer, facts), request.output)
    if request.output_format == "text" and not request.quiet:
        click.echo(printable(report.evidence(answer)), err=True, nl=False)
