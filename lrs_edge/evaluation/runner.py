"""Asking a bundle all questions of a file, image by image, and recording every answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from lrs_edge import __version__
from lrs_edge.answer.answer import Answer, Timings
from lrs_edge.baselines.inside import plan_pruning
from lrs_edge.bundle.bundle import MANIFEST_NAME, default_bundle_path
from lrs_edge.engine import Engine
from lrs_edge.engines.metered import GraphWork
from lrs_edge.errors import (
    BackendError,
    BundleError,
    LrsEdgeError,
    OutOfMemoryError,
    UsageError,
    out_of_memory,
)
from lrs_edge.evaluation.flops import count_flops, graph_costs
from lrs_edge.evaluation.question_formats import MME_END_STR, EvalQuestion
from lrs_edge.evaluation.questions import QuestionFile
from lrs_edge.evaluation.results import (
    SCHEMA_NAME,
    SCHEMA_VERSION,
    FinestLevel,
    FlopCounts,
    QuestionSource,
    Result,
    Results,
    ResultsWriter,
    RunHeader,
    Work,
)
from lrs_edge.requests.options import INSIDE, AskOptions, view_for
from lrs_edge.scene import Scene

#: Told about every recorded answer.
OnResult = Callable[[Result], None]

_SECOND_DIGITS = 5
_CERTAINTY_DIGITS = 5


@dataclass(frozen=True)
class RunSettings:
    """What is asked, and how.

    Attributes:
        questions: The question file.
        images: Folder that the questions' image paths are in.
        options: Of every question.
        bands: Bands shown as red, green and blue.
        value_range: Values shown as black and white.
        crs: Coordinate reference system of images that do not name theirs.
        view: Further choices of how images are shown, for `Engine.open`.
        limit: Ask only the first so many questions of the file.
        num_chunks: Parts that the questions are split into.
        chunk: Which part is asked, from 0.
        retry_errors: Ask again where an earlier run recorded an error.

    Raises:
        UsageError: The chunk is none of the chunks.
    """

    questions: QuestionFile
    images: Path
    options: AskOptions
    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    crs: str | None = None
    view: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    num_chunks: int = 1
    chunk: int = 0
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.chunk < self.num_chunks:
            raise UsageError(
                f"chunk {self.chunk} is not one of 0..{self.num_chunks - 1}; with --num-chunks "
                f"{self.num_chunks}, --chunk counts from 0"
            )


def question_options(questions: QuestionFile, options: AskOptions) -> AskOptions:
    """Options with the instruction that the authors put after MME-RealWorld's questions.

    An instruction of the user's own stays.

    Raises:
        UsageError: It is not text, and could not be recorded.
    """
    try:
        options.end_str.encode()
    except UnicodeEncodeError as error:
        raise UsageError("--end-str is not valid Unicode text; write it in UTF-8") from error
    if questions.format == "mme-realworld" and not options.end_str:
        return replace(options, end_str=MME_END_STR)
    return options


def make_header(settings: RunSettings, engine: Engine, bundle: Path | None) -> RunHeader:
    """The header of a run's results file.

    Args:
        settings: Of the run.
        engine: The loaded bundle.
        bundle: The bundle's directory; None for the embedded model.
    """
    root = default_bundle_path() if bundle is None else bundle
    questions = settings.questions
    return RunHeader(
        schema=SCHEMA_NAME,
        schema_version=SCHEMA_VERSION,
        lrs_edge=__version__,
        model=engine.manifest.name,
        manifest_sha256=hashlib.sha256((root / MANIFEST_NAME).read_bytes()).hexdigest(),
        tile=engine.manifest.vision.tile,
        provider=engine.provider,
        questions=QuestionSource(
            _shown(questions.path.name),
            questions.sha256,
            questions.format,
            len(questions.questions),
        ),
        options=_plain(asdict(settings.options)),
        bands=settings.bands,
        value_range=settings.value_range,
        view=dict(settings.view) or None,
        num_chunks=settings.num_chunks,
        chunk=settings.chunk,
    )


def _shown(name: str) -> str:
    """A file's name as JSON can hold it: bytes that are not Unicode become question marks."""
    return name.encode(errors="replace").decode()


def _plain(options: dict[str, object]) -> dict[str, object]:
    """Options as JSON gives them back: lists instead of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
    }


def check_bundle(settings: RunSettings, engine: Engine) -> None:
    """Refuse a way to prune that the bundle cannot do: every single question would fail.

    Raises:
        UsageError: The language model is not cut at a layer that was asked for.
        BundleError: It is not cut at all.
    """
    if settings.options.prune in INSIDE:
        plan_pruning(settings.options, engine.manifest.llm.segments)


def check_images(settings: RunSettings) -> None:
    """Refuse a folder in which no image lies, before a model is loaded.

    Single images that are missing are errors of their questions.

    Raises:
        UsageError: None of the images is there.
    """
    names = dict.fromkeys(question.image for question in chosen_questions(settings))
    # Not `Path.is_file`: it raises where a name is too long for a file.
    if names and not any(os.path.isfile(settings.images / name) for name in names):
        raise UsageError(
            f"none of the {len(names)} images of {settings.questions.path} is in "
            f"{settings.images}; --images names the folder that {next(iter(names))!r} is in"
        )


def chosen_questions(settings: RunSettings) -> list[EvalQuestion]:
    """The questions of this run's chunk, those about one image together.

    Chunks are as even as can be and, apart from the images at their ends, hold whole images, so
    that tiles encoded for one question serve the others.
    """
    questions = settings.questions.questions[: settings.limit]
    first_seen: dict[str, int] = {}
    for question in questions:
        first_seen.setdefault(question.image, len(first_seen))
    ordered = sorted(questions, key=lambda question: first_seen[question.image])
    count, parts = len(ordered), settings.num_chunks
    start, end = (count * place // parts for place in (settings.chunk, settings.chunk + 1))
    return ordered[start:end]


def unanswered(settings: RunSettings, known: Results) -> list[EvalQuestion]:
    """Those of `chosen_questions` that an earlier run left to be asked."""
    return [
        question
        for question in chosen_questions(settings)
        if question.index not in known.by_index
        or (settings.retry_errors and known.by_index[question.index].error)
    ]


def run(
    engine: Engine,
    settings: RunSettings,
    known: Results,
    writer: ResultsWriter,
    on_result: OnResult,
) -> None:
    """Ask what has no answer yet, and record every answer as it comes.

    A question or an image that fails is recorded as an error, and the run goes on; running out of
    memory counts as such, a broken engine does not.

    Args:
        engine: The loaded bundle.
        settings: What to ask.
        known: Results of an earlier run, which are not asked for again.
        writer: Records.
        on_result: Told about every new result.

    Raises:
        BackendError: The engine fails.
        BundleError: A graph is not what the manifest says.
        LrsEdgeError: The results cannot be written.
    """
    todo = unanswered(settings, known)
    for image, group in groupby(todo, key=lambda question: question.image):
        for result in _image_results(engine, settings, image, list(group)):
            writer.append(result)
            on_result(result)


def _image_results(
    engine: Engine, settings: RunSettings, image: str, questions: Sequence[EvalQuestion]
) -> Iterable[Result]:
    path = settings.images / image
    try:
        view = view_for(settings.options.policy, settings.view)
        scene = engine.open(
            path,
            bands=settings.bands,
            value_range=settings.value_range,
            crs=settings.crs,
            **view,
        )
    except (LrsEdgeError, MemoryError) as error:
        failed = _said(error)
        for question in questions:
            yield _result(question, "", error=failed)
        return
    with scene:
        for question in questions:
            yield _answered(engine, scene, question, settings.options)


def _answered(engine: Engine, scene: Scene, question: EvalQuestion, options: AskOptions) -> Result:
    before = engine.meter.read()
    try:
        answer = scene.ask(question.text, options)
    except (OutOfMemoryError, MemoryError) as error:
        return _result(question, "", error=_said(error))
    except (BackendError, BundleError):
        raise
    except LrsEdgeError as error:
        return _result(question, "", error=str(error))
    done = engine.meter.since(before)
    return _result(question, answer.text, work=_work(engine, answer, done), answer=answer)


def _said(error: Exception) -> str:
    """What a failed question's result says."""
    if isinstance(error, MemoryError):
        return str(out_of_memory("the question cannot be answered", error))
    return str(error)


def _work(engine: Engine, answer: Answer, done: dict[str, GraphWork]) -> Work:
    manifest = engine.manifest
    flops = count_flops(graph_costs(manifest), done)
    return Work(
        image_size=answer.image_size,
        search_end=answer.search_end,
        finish_reason=answer.finish_reason,
        tiles_encoded=sum(level.tiles_encoded for level in answer.levels),
        tiles_from_cache=sum(level.tiles_from_cache for level in answer.levels),
        tokens=answer.tokens,
        seconds=_rounded(answer.timings),
        flops=None if flops is None else FlopCounts(flops.vision, flops.rfm, flops.llm),
        finest=_finest(answer),
    )


def _rounded(timings: Timings) -> Timings:
    return Timings(
        **{name: round(value, _SECOND_DIGITS) for name, value in asdict(timings).items()}
    )


def _finest(answer: Answer) -> FinestLevel | None:
    if not answer.levels:
        return None
    finest = answer.levels[-1]
    looked_at = sorted(
        (region.row, region.col) for region in answer.regions if region.level == finest.level
    )
    return FinestLevel(
        height=finest.height,
        width=finest.width,
        tile_rows=finest.tile_rows,
        tile_cols=finest.tile_cols,
        tiles=tuple(looked_at),
    )


def _result(
    question: EvalQuestion,
    text: str,
    *,
    error: str = "",
    work: Work | None = None,
    answer: Answer | None = None,
) -> Result:
    names = ("confidence", "margin", "log_probability", "least_log_probability")
    sure = {} if answer is None else {name: _shortened(getattr(answer, name)) for name in names}
    return Result(
        index=question.index,
        question_id=question.question_id,
        image=question.image,
        category=question.category,
        dataset=question.dataset,
        prompt=question.text,
        ground_truth=question.ground_truth,
        text=text,
        choices=question.choices,
        hbox=question.boxes,
        thing=question.thing,
        error=error,
        work=work,
        **sure,
    )


def _shortened(value: float | None) -> float | None:
    return None if value is None else round(value, _CERTAINTY_DIGITS)
