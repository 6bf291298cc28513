"""`lrs-edge eval`: a bundle's answers to a question file, scored."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrs_edge.commands.common import (
    GroupedCommand,
    check_output,
    debug_option,
    format_option,
    one_line,
    printable,
    quiet_option,
    restrict_image_formats,
    take_view,
    write_result,
)
from lrs_edge.commands.matching import choose_matcher, matching_options
from lrs_edge.commands.search_options import (
    ask_options,
    check_value_range,
    engine_options,
    image_options,
    model_option,
    take_ask_options,
)
from lrs_edge.errors import UsageError

if TYPE_CHECKING:
    from lrs_edge.evaluation.matching import Matcher
    from lrs_edge.evaluation.results import Result, Results
    from lrs_edge.evaluation.runner import RunSettings

#: Writes a line for people.
Tell = Callable[[str], None]

EXIT_FAILED = 1

#: Errors of single questions that are told one by one; the others are counted.
_MOST_ERRORS_TOLD = 10


@click.command("eval", cls=GroupedCommand)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="QUESTIONS | RESULTS...",
    type=click.Path(path_type=Path),
)
@click.option("--score", is_flag=True, help="Score RESULTS (chunks of one run) without running.")
@click.option("--compare", is_flag=True, help="Compare two RESULTS, A and B, over one file.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that the questions' image paths are in.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="RESULTS",
    help="Results file (JSONL); where it exists, the run goes on.",
)
@format_option("table", "json", "csv")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask the first N questions.")
@click.option(
    "--num-chunks",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Split the questions into N parts, one per device.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="K",
    help="Ask part K, from 0.",
)
@click.option("--retry-errors", is_flag=True, help="Ask again what failed in the run before.")
@matching_options
@model_option
@ask_options
@image_options
@engine_options
@quiet_option
@debug_option
@click.pass_context
def evaluate(ctx: click.Context, /, **values: Any) -> None:
    """Run a bundle over a file of QUESTIONS and score its answers.

    QUESTIONS is LRS-VQA's JSONL or MME-RealWorld-RS's JSON. Every answer is appended to RESULTS at
    once; the same command goes on after an interruption. --score and --compare read RESULTS.
    """
    if values["score"] and values["compare"]:
        raise UsageError("--score and --compare cannot be used together; give one of them")
    if values["score"]:
        _refuse_run_options(ctx, "--score")
        _score(values)
    elif values["compare"]:
        _refuse_run_options(ctx, "--compare")
        _compare(values)
    elif not _run(values):
        ctx.exit(EXIT_FAILED)


#: The command's name is its file's, as `commands/main.py` looks it up.
eval = evaluate  # noqa: A001

#: Parameters that --score and --compare use; all others belong to a run.
_SCORING_PARAMETERS = (
    *("files", "score", "compare", "output_format", "synonyms", "wordnet", "quiet", "debug"),
)


def _refuse_run_options(ctx: click.Context, mode: str) -> None:
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in _SCORING_PARAMETERS:
            raise UsageError(f"{parameter.opts[-1]} is for a run; leave it out with {mode}")


def _score(values: dict[str, Any]) -> None:
    from lrs_edge.evaluation.results import read_results

    results = read_results(values["files"])
    _tell_score(results, choose_matcher(results.header.questions.format, values), values)


def _compare(values: dict[str, Any]) -> None:
    from lrs_edge.evaluation.comparison import compare
    from lrs_edge.evaluation.results import read_results
    from lrs_edge.evaluation.tables import comparison_text

    files = values["files"]
    if len(files) != 2:
        raise UsageError(f"--compare takes two results files, not {len(files)}")
    first, second = (read_results([path]) for path in files)
    found = compare(first, second, choose_matcher(first.header.questions.format, values))
    write_result(printable(comparison_text(found, values["output_format"])), None)


def _run(values: dict[str, Any]) -> bool:
    """Run, or go on with a run; True where no question failed."""
    from lrs_edge.evaluation.results import read_results

    settings, matcher, tell = _prepare(values)
    _ask(values, settings, matcher, tell)
    results = read_results([values["output"]])
    if not len(results):
        tell(f"there are fewer questions than chunks; chunk {settings.chunk} has none")
        return True
    failed = sum(bool(result.error) for result in results)
    if failed:
        tell(f"failed, counted as wrong: {failed} (--retry-errors asks again)")
    _tell_score(results, matcher, values)
    return not failed


def _prepare(values: dict[str, Any]) -> tuple[RunSettings, Matcher, Tell]:
    """Check everything that can be checked before the model is loaded."""
    from lrs_edge.evaluation.questions import read_questions
    from lrs_edge.evaluation.runner import RunSettings, check_images, question_options

    output, images, files = values["output"], values["images"], values["files"]
    if len(files) != 1:
        raise UsageError("name one file of questions, or use --score or --compare")
    if output is None or images is None:
        raise UsageError("a run needs --images DIR and -o RESULTS; see `lrs-edge eval --help`")
    if not images.is_dir():
        raise UsageError(f"{images} is not a directory; --images names the folder of the images")
    check_results(output, files[0])
    options = take_ask_options(values)
    check_value_range(values["value_range"])
    tell: Tell = _nothing if values["quiet"] else _on_stderr
    questions = read_questions(files[0])
    for note in questions.notes:
        tell(f"{questions.path.name}: {note}")
    settings = RunSettings(
        questions=questions,
        images=images,
        options=question_options(questions, options),
        bands=values["bands"],
        value_range=values["value_range"],
        crs=values["crs"],
        view=take_view(values),
        limit=values["limit"],
        num_chunks=values["num_chunks"],
        chunk=values["chunk"],
        retry_errors=values["retry_errors"],
    )
    check_images(settings)
    return settings, choose_matcher(questions.format, values), tell


def check_results(output: Path, questions: Path) -> None:
    """Refuse a results file that cannot be written, before the model is loaded.

    Raises:
        UsageError: See `check_output`; or it is not a regular file, or may not be read and written.
    """
    # Not Path's methods, which raise where a name is too long.
    if (
        not os.path.exists(output)
        or output.is_dir()
        or (questions.exists() and output.samefile(questions))
    ):
        check_output(output, questions)
    elif not output.is_file():
        raise UsageError(f"{output} is not a regular file; results are read again, so name one")
    elif not os.access(output, os.R_OK | os.W_OK):
        raise UsageError(f"{output} cannot be read and written; name another file with -o")


def _ask(values: dict[str, Any], settings: RunSettings, matcher: Matcher, tell: Tell) -> None:
    import lrs_edge
    from lrs_edge.commands.eval_progress import EvalProgress
    from lrs_edge.evaluation import runner
    from lrs_edge.evaluation.results import open_results

    restrict_image_formats()
    with lrs_edge.load(
        values["bundle"],
        device=values["device"],
        threads=values["threads"],
        kv_cache=values["kv_cache"],
        verify=values["verify"],
    ) as engine:
        runner.check_bundle(settings, engine)
        header = runner.make_header(settings, engine, values["bundle"])
        known, writer = open_results(values["output"], header)
        chosen = [question.index for question in runner.chosen_questions(settings)]
        waiting = {question.index for question in runner.unanswered(settings, known)}
        shown = not values["quiet"] and sys.stderr is not None and sys.stderr.isatty()
        with writer, EvalProgress(len(chosen), enabled=shown) as progress:

            def count(result: Result) -> None:
                progress.add(correct=_is_correct(matcher, result), failed=bool(result.error))

            # Not what lies beyond a smaller --limit, nor errors that are asked again.
            for index in chosen:
                if index not in waiting:
                    count(known.by_index[index])
            told = 0

            def on_result(result: Result) -> None:
                nonlocal told
                count(result)
                if result.error and told < _MOST_ERRORS_TOLD:
                    told += 1
                    tell(f"question {result.question_id} failed: {result.error}")

            runner.run(engine, settings, known, writer, on_result)


def _is_correct(matcher: Matcher, result: Result) -> bool:
    right = matcher.match(result.text, result.ground_truth, result.choices)
    return right is not None and not result.error


def _tell_score(results: Results, matcher: Matcher, values: dict[str, Any]) -> None:
    from lrs_edge.evaluation.scoring import score
    from lrs_edge.evaluation.tables import score_text

    write_result(printable(score_text(score(results, matcher), values["output_format"])), None)


def _on_stderr(text: str) -> None:
    click.echo(one_line(text), err=True)


def _nothing(_: str) -> None:
    """For --quiet."""
