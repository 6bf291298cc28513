"""`lrs-edge calibrate`: how sure a bundle's answers are, written into a copy of the bundle."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrs_edge.commands.common import (
    GroupedCommand,
    debug_option,
    format_option,
    number_list,
    printable,
    quiet_option,
    restrict_image_formats,
    step_teller,
    write_result,
)
from lrs_edge.commands.matching import choose_matcher, matching_options
from lrs_edge.commands.search_options import engine_options, model_option
from lrs_edge.errors import UsageError

if TYPE_CHECKING:
    from lrs_edge.bundle.bundle import Bundle
    from lrs_edge.bundle.calibration import Calibration, Domain
    from lrs_edge.engine import Engine
    from lrs_edge.evaluation.calibration import Fit
    from lrs_edge.evaluation.questions import QuestionFile
    from lrs_edge.evaluation.results import Results
    from lrs_edge.evaluation.runner import RunSettings
    from lrs_edge.language.yes_no import YesNo

#: Writes a line for people.
Tell = Callable[[str], None]

_FIRST_BYTES = 4096


@click.command(cls=GroupedCommand)
@click.argument(
    "files", nargs=-1, metavar="RESULTS | QUESTIONS...", type=click.Path(path_type=Path)
)
@model_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="Folder of the copy; the bundle's own to change its manifest in place.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that the image paths of QUESTIONS are in.",
)
@click.option(
    "--results",
    "kept",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the answers to QUESTIONS there; where some are, go on from those.",
)
@click.option(
    "--domain-images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Image, or folder of images, like those of training: scenes of other colours or ground "
    "resolution give a warning. May be given several times.",
)
@click.option(
    "--ground-resolution",
    "resolutions",
    multiple=True,
    type=number_list(float, (2,)),
    metavar="LOW,HIGH",
    help="Metres a pixel of training, in addition to those of --domain-images. May be given "
    "several times.",
)
@matching_options
@engine_options
@format_option("table", "json")
@quiet_option
@debug_option
def calibrate(**values: Any) -> None:
    """Fit how sure a bundle's answers are, and write it into a copy of the bundle.

    RESULTS of `lrs-edge eval` are fitted to as they are; QUESTIONS, in the forms that it takes, are
    asked first, with its default options. Use questions about real images that the model was not
    trained on. What is not fitted stays as it was in the bundle.
    """
    from lrs_edge.bundle.bundle import open_bundle
    from lrs_edge.bundle.rewriting import check_target, write_calibrated
    from lrs_edge.evaluation.calibration_text import calibration_text
    from lrs_edge.evaluation.domain import image_files, joined_ranges

    tell = step_teller(quiet=values["quiet"])
    if not (values["files"] or values["domain_images"] or values["resolutions"]):
        raise UsageError(
            "there is nothing to fit; name RESULTS or QUESTIONS, or give --domain-images"
        )
    joined_ranges(values["resolutions"])
    results, questions = _read(values, tell)
    images = image_files(values["domain_images"]) if values["domain_images"] else []
    bundle = open_bundle(values["bundle"], verify=values["verify"])
    check_target(bundle.path, values["output"])
    restrict_image_formats()
    results += _asked(values, questions, tell) if questions else []
    fitted = _fit(bundle, results, values, tell) if results else None
    domain, seen = _domain(bundle, images, values["resolutions"], tell)
    calibration = _joined(bundle.manifest.calibration, fitted, domain)
    write_calibrated(bundle, values["output"], calibration)
    text = calibration_text(fitted, calibration, seen, values["output_format"])
    write_result(printable(text), None)
    tell(f"{values['output']} written")


def _read(values: dict[str, Any], tell: Tell) -> tuple[list[Results], list[QuestionFile]]:
    """The files, told apart by their first line."""
    from lrs_edge.evaluation.questions import read_questions
    from lrs_edge.evaluation.results import SCHEMA_NAME, read_results

    results, questions = [], []
    for path in values["files"]:
        try:
            with path.open("rb") as stream:
                first = stream.read(_FIRST_BYTES)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read ({error.strerror}); name results or questions"
            ) from error
        if first.startswith(b'{"schema"') and SCHEMA_NAME.encode() in first:
            results.append(read_results([path]))
        else:
            questions.append(read_questions(path))
            for note in questions[-1].notes:
                tell(f"{path.name}: {note}")
    if questions and values["images"] is None:
        raise UsageError("QUESTIONS need --images DIR, the folder that their image paths are in")
    for name in ("images", "kept"):
        if values[name] is not None and not questions:
            option = "results" if name == "kept" else name
            raise UsageError(f"--{option} is for QUESTIONS; leave it out")
    return results, questions


def _asked(values: dict[str, Any], questions: Sequence[QuestionFile], tell: Tell) -> list[Results]:
    """Ask everything in question files."""
    import lrs_edge
    from lrs_edge.evaluation.results import read_results
    from lrs_edge.evaluation.runner import RunSettings, check_images, question_options
    from lrs_edge.requests.options import AskOptions

    runs = [
        RunSettings(file, values["images"], question_options(file, AskOptions()))
        for file in questions
    ]
    for settings in runs:
        check_images(settings)
    found = []
    with (
        _results_folder(values["kept"]) as folder,
        lrs_edge.load(
            values["bundle"],
            device=values["device"],
            threads=values["threads"],
            kv_cache=values["kv_cache"],
            verify=values["verify"],
        ) as engine,
    ):
        for number, settings in enumerate(runs, 1):
            target = folder / f"{number}-{settings.questions.path.stem}.results.jsonl"
            asked = settings.questions
            tell(f"asking the {len(asked.questions)} questions of {asked.path.name}")
            _run(engine, settings, target, values)
            found.append(read_results([target]))
    return found


@contextmanager
def _results_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{kept} cannot be a folder ({error.strerror}); name another with --results"
            ) from error
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="lrs-edge-") as folder:
        yield Path(folder)


def _run(engine: Engine, settings: RunSettings, target: Path, values: dict[str, Any]) -> None:
    from lrs_edge.commands.eval_progress import EvalProgress
    from lrs_edge.evaluation import runner
    from lrs_edge.evaluation.results import Result, open_results

    matcher = choose_matcher(settings.questions.format, values)
    header = runner.make_header(settings, engine, values["bundle"])
    known, writer = open_results(target, header)
    shown = not values["quiet"] and sys.stderr is not None and sys.stderr.isatty()
    waiting = len(runner.unanswered(settings, known))
    with writer, EvalProgress(waiting, enabled=shown) as progress:

        def count(result: Result) -> None:
            right = matcher.match(result.text, result.ground_truth, result.choices)
            progress.add(correct=right is not None, failed=bool(result.error))

        runner.run(engine, settings, known, writer, count)


def _fit(bundle: Bundle, results: Sequence[Results], values: dict[str, Any], tell: Tell) -> Fit:
    from lrs_edge.bundle.bundle import MANIFEST_NAME
    from lrs_edge.evaluation.calibration import fit, samples_of

    manifest = hashlib.sha256((bundle.path / MANIFEST_NAME).read_bytes()).hexdigest()
    samples = []
    for run in results:
        if run.header.manifest_sha256 != manifest:
            tell(
                f"the results on {run.header.questions.file} are of a bundle with another manifest "
                f"({run.header.manifest_sha256[:8]}, not {manifest[:8]}): the fit holds only if "
                "its graphs and its tokenizer are the same"
            )
        samples += samples_of(run, choose_matcher(run.header.questions.format, values))
    fitted = fit(samples, _words(bundle))
    for note in fitted.notes:
        tell(note)
    return fitted


def _words(bundle: Bundle) -> YesNo:
    """Tokens of yes and no, as a run has them."""
    from lrs_edge.language.prompt import Prompt
    from lrs_edge.language.yes_no import YesNo, yes_no_tokens

    manifest = bundle.manifest
    known = None if manifest.calibration is None else manifest.calibration.yes_no
    if known is not None:
        return YesNo(known.yes_ids, known.no_ids)
    tokenizer = bundle.file(manifest.tokenizer)
    return yes_no_tokens(Prompt(tokenizer, manifest.prompt, manifest.llm.vocabulary))


def _domain(
    bundle: Bundle,
    images: Sequence[Path],
    resolutions: Sequence[tuple[float, float]],
    tell: Tell,
) -> tuple[Domain | None, int | None]:
    """The domain, and the number of its images; None where nothing was asked for."""
    from lrs_edge.bundle.calibration import Domain
    from lrs_edge.evaluation.domain import fit_domain, joined_ranges

    if not (images or resolutions):
        return None, None
    found, seen = Domain(), None
    if images:
        tell(f"looking at {len(images)} images")
        found, seen = fit_domain(bundle.manifest, images, tell)
    ranges = joined_ranges([*resolutions, *found.resolutions])
    return Domain(ranges, found.colours), seen


def _joined(old: Calibration | None, fitted: Fit | None, domain: Domain | None) -> Calibration:
    """What was fitted; the rest as it was."""
    from lrs_edge.bundle.calibration import Calibration

    old = old or Calibration()
    new = old if fitted is None else fitted.calibration
    return Calibration(
        new.yes_no or old.yes_no,
        new.open or old.open,
        domain or old.domain,
        new.questions,
        new.calibration_error,
    )
