"""`lrs-edge watch`: every product that lands in a folder is asked its questions."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lrs_edge.commands.common import (
    OWNS_PROCESS_KEY,
    GroupedCommand,
    debug_option,
    printable,
    quiet_option,
    restrict_image_formats,
    step_teller,
    take_view,
)
from lrs_edge.commands.search_options import (
    ask_options,
    check_value_range,
    engine_options,
    image_options,
    model_option,
    take_ask_options,
)
from lrs_edge.errors import QuarantineError, UsageError
from lrs_edge.requests.options import view_for

if TYPE_CHECKING:
    from lrs_edge.watching.worker import Settings, Worker

#: Seconds after a signal when the process ends whatever it does: the journal is always whole.
_LONGEST_END = 0.8

_POSITIVE = click.FloatRange(min=0, min_open=True)
_NOT_NEGATIVE = click.FloatRange(min=0)


@click.command(cls=GroupedCommand)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--questions",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Questions: text with one a line, or JSON lines with text and question_id.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of results, quarantine records and the journal; made where it is not there.",
)
@click.option("--once", is_flag=True, help="End when all that is there is answered.")
@click.option(
    "--pattern",
    "patterns",
    multiple=True,
    metavar="NAME",
    help="Names of products, such as '*.tif'; may be repeated. Default: endings of images.",
)
@click.option(
    "--folder",
    "folders",
    multiple=True,
    metavar="NAME",
    help="Names of folders that are one product each; may be repeated. Default: '*.SAFE'.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="PATH",
    help="The image in such a folder, such as 'measurement/*-vv-*.tiff'; may be repeated, the "
    "first that matches is taken. Default: the true-colour image of Sentinel-2, then others.",
)
@click.option(
    "--wait-for",
    "wait_for",
    multiple=True,
    metavar="NAME",
    help="File that must be there before a product counts as whole, such as '{stem}.xml' or "
    "'{name}.md5'; may be repeated.",
)
@click.option(
    "--settle",
    type=_NOT_NEGATIVE,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="A product is whole when nothing of it has changed for so long.",
)
@click.option(
    "--interval",
    type=_POSITIVE,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between looks at the folder; the extra `watch` also tells of changes at once.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    metavar="N",
    help="Further attempts at a product that failed, before it goes into quarantine.",
)
@click.option(
    "--retry-delay",
    type=_NOT_NEGATIVE,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Time before the first of them; each later one waits twice as long.",
)
@click.option(
    "--time-limit",
    type=_POSITIVE,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Time for one attempt at all questions about a product.",
)
@click.option(
    "--hook",
    metavar="COMMAND",
    help="Program with arguments, run for every result without a shell; {json}, {geojson}, "
    "{product} and {question_id} are filled in, without any the JSON file is appended.",
)
@click.option(
    "--hook-limit",
    type=_POSITIVE,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time after which a hook is ended.",
)
@click.option(
    "--move-quarantined",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Move products in quarantine to a folder on the same file system; without it they stay.",
)
@click.option("--retry-quarantined", is_flag=True, help="First take all out of quarantine.")
@model_option
@ask_options
@image_options
@engine_options
@quiet_option
@debug_option
@click.pass_context
def watch(ctx: click.Context, /, **values: Any) -> None:
    """Ask every product that lands in DIR the questions of a file.

    Each answer becomes a JSON and, where the image has a place on the earth, a GeoJSON file in the
    folder --out, and one line of JSON on standard output. A killed run goes on where it was.
    SIGTERM and Ctrl-C end it in order. Exit code 7 where --once put a product into quarantine.
    """
    options = take_ask_options(values)
    view = view_for(options.policy, take_view(values))
    check_value_range(values["value_range"])
    image_values = {name: values[name] for name in ("bands", "value_range", "crs")}
    code = _watch(ctx, values, _settings(values), options, {**image_values, **view})
    if code:
        ctx.exit(code)


def _settings(values: dict[str, Any]) -> Settings:
    """Check all that can be checked before the model is loaded, and make the output folder."""
    from lrs_edge.watching.hook import read_hook
    from lrs_edge.watching.products import FILES, FOLDERS, IMAGES, Patterns
    from lrs_edge.watching.questions import read_questions
    from lrs_edge.watching.worker import Settings

    folder, out, away = values["folder"], values["out"], values["move_quarantined"]
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is not a folder; name the one that products land in")
    for name in ("settle", "interval", "retry_delay", "time_limit", "hook_limit"):
        if not math.isfinite(values[name]):
            raise UsageError(f"--{name.replace('_', '-')} must be a finite number of seconds")
    for template in values["wait_for"]:
        try:
            template.format(name="a.tif", stem="a")
        except (LookupError, ValueError, AttributeError) as error:
            raise UsageError(
                f"--wait-for {template!r} is no name; {{name}} and {{stem}} may stand in it"
            ) from error
    hook = None if values["hook"] is None else read_hook(values["hook"], values["hook_limit"])
    questions = read_questions(values["questions"])
    for target in (out, *([] if away is None else [away])):
        try:
            os.makedirs(target, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{target} cannot be made ({error.strerror}); name a folder"
            ) from error
        if os.path.samefile(folder, target):
            raise UsageError(f"{target} is the watched folder itself; name another one")
    return Settings(
        root=folder,
        questions=questions,
        leave_out=(out,) if away is None else (out, away),
        patterns=Patterns(
            values["patterns"] or FILES,
            values["folders"] or FOLDERS,
            values["images"] or IMAGES,
            values["wait_for"],
        ),
        settle=values["settle"],
        interval=values["interval"],
        retries=values["retries"],
        retry_delay=values["retry_delay"],
        time_limit=values["time_limit"],
        hook=hook,
        move_to=away,
        once=values["once"],
    )


def _watch(
    ctx: click.Context,
    values: dict[str, Any],
    settings: Settings,
    options: Any,
    image_options: dict[str, Any],
) -> int:
    """Run; returns the exit code."""
    import lrs_edge
    from lrs_edge.watching.asking import EngineAsker
    from lrs_edge.watching.journal import Journal
    from lrs_edge.watching.results import Results
    from lrs_edge.watching.waking import Waking, notices
    from lrs_edge.watching.worker import Stopped, Worker

    tell = step_teller(quiet=values["quiet"])
    owns = bool((ctx.find_root().obj or {}).get(OWNS_PROCESS_KEY))
    restrict_image_formats()
    waking = Waking()
    journal = Journal(values["out"])
    try:
        results = Results(values["out"])
        if values["retry_quarantined"]:
            tell(f"out of quarantine: {journal.release()}")
        with _signals(owns=owns, fails=settings.once) as ending:
            try:
                with (
                    lrs_edge.load(
                        values["bundle"],
                        device=values["device"],
                        threads=values["threads"],
                        kv_cache=values["kv_cache"],
                        verify=values["verify"],
                    ) as engine,
                    notices(settings.root, waking) as how,
                ):
                    asker = EngineAsker(engine, options, image_options)
                    worker = Worker(settings, journal, results, asker, waking, _write_line, tell)
                    ending.worker = worker
                    tell(
                        f"watching {settings.root}, {how}; questions: {len(settings.questions)}, "
                        f"results in {results.answers}"
                    )
                    worker.run()
            except Stopped:
                pass
    finally:
        journal.close()
    if ending.number is not None:
        tell("ended; the next run goes on from here")
        return 128 + ending.number if settings.once else 0
    _tell_end(worker, values["out"], tell)
    return 0


def _tell_end(worker: Worker, out: Path, tell: Any) -> None:
    count = worker.quarantined
    tell(f"answered {worker.answered}, into quarantine {count}")
    if count:
        raise QuarantineError(
            f"{count} product{'s' * (count != 1)} went into quarantine; "
            f"{out / 'quarantine'} says why, --retry-quarantined tries again"
        )


def _write_line(line: str) -> None:
    click.echo(printable(line), nl=False)
    # A reader sees each result when it is there, and a kill loses none that the journal has.
    if sys.stdout is not None:
        sys.stdout.flush()


class _Ending:
    """The signal that asked for the end, if any."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.worker: Worker | None = None


@contextmanager
def _signals(*, owns: bool, fails: bool) -> Iterator[_Ending]:
    """Let SIGTERM and SIGINT end the loop in order, and within a second.

    Args:
        owns: Whether the process is the command's own, and may be ended.
        fails: Whether an end by a signal is a failure.
    """
    from lrs_edge.watching.worker import Stopped

    ending = _Ending()

    def end(number: int, _frame: FrameType | None) -> None:
        if ending.number is not None:
            return
        ending.number = number
        if ending.worker is not None:
            ending.worker.stop()
        if owns:
            # A step of a large model takes longer than a second, and cannot be interrupted.
            timer = threading.Timer(_LONGEST_END, _leave, [128 + number if fails else 0])
            timer.daemon = True
            timer.start()
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield ending
    finally:
        if ending.number is None:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _leave(code: int) -> NoReturn:
    """End now; every transaction and file is either whole or not there."""
    os._exit(code)
