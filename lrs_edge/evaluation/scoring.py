"""Figures of one run: accuracy, region recall, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from lrs_edge.answer.answer import Timings, TokenCounts
from lrs_edge.errors import UsageError
from lrs_edge.evaluation.coverage import Coverage, coverage
from lrs_edge.evaluation.matching import Match, Matcher
from lrs_edge.evaluation.reliability import Reliability, reliability
from lrs_edge.evaluation.results import FinestLevel, Result, Results, RunHeader
from lrs_edge.pyramid.levels import Level

#: Upper bounds of the bins of images by their long side in pixels; LRS-VQA's reach 27,328.
SIZE_BINS = (1_000, 2_000, 4_000, 8_000, 16_000)

#: More tiles than a level of an image of a million pixels a side has.
_MAX_TILES = 1 << 24

UNKNOWN_SIZE = "unknown"


@dataclass(frozen=True)
class Scored:
    """One result and what it is worth.

    Attributes:
        result: The result.
        match: How the answer is right, None where it is wrong or missing.
        coverage: Of its evidence; None where it has none, or failed.
    """

    result: Result
    match: Match | None
    coverage: Coverage | None

    @property
    def correct(self) -> bool:
        """Whether the answer counts."""
        return self.match is not None


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy of some questions.

    Attributes:
        name: Of the group.
        questions: How many there are.
        correct: How many were answered right.
        average: Mean of the accuracies of their categories (the authors' AA), 0..1.
    """

    name: str
    questions: int
    correct: int
    average: float

    @property
    def accuracy(self) -> float:
        """Share answered right (the authors' OA), 0..1."""
        return self.correct / self.questions if self.questions else 0.0


@dataclass(frozen=True)
class RegionFigures:
    """Whether the search looked at the evidence, over the questions that have boxes.

    Attributes:
        questions: How many have.
        recall: Share of them of whose evidence at least half was looked at, at the finest level
            searched.
        coverage: Mean share of the evidence's area looked at.
        random_recall: Expected recall of as many tiles chosen at random.
        random_coverage: Their expected coverage.
    """

    questions: int
    recall: float
    coverage: float
    random_recall: float
    random_coverage: float


@dataclass(frozen=True)
class CostFigures:
    """Means over the questions that were answered.

    Attributes:
        questions: How many were.
        tiles: Tiles looked at, the global view not counted.
        tiles_encoded: Those of them that were not remembered from an earlier question.
        tokens: Tokens, by the names of `TokenCounts`.
        seconds: Seconds, by the names of `Timings`.
        tflops: 10^12 operations by stage, and `total`; empty where the bundle does not say.
    """

    questions: int
    tiles: float
    tiles_encoded: float
    tokens: dict[str, float]
    seconds: dict[str, float]
    tflops: dict[str, float]


@dataclass(frozen=True)
class Score:
    """All figures of one run.

    Attributes:
        header: Of the results.
        overall: All questions that have a result.
        exact: How many were right by an exact match.
        synonyms: How many by a synonym.
        knows_synonyms: Whether synonyms counted.
        errors: Questions that failed; they count as wrong.
        timeouts: Answers that were cut short by --timeout.
        missing: Questions of the file without a result.
        categories: By category.
        datasets: By source dataset.
        sizes: By the image's long side.
        regions: None where no question has boxes.
        cost: None where nothing was answered.
        reliability: Of the answers' confidence; None where none has any.
    """

    header: RunHeader
    overall: GroupAccuracy
    exact: int
    synonyms: int
    knows_synonyms: bool
    errors: int
    timeouts: int
    missing: int
    categories: tuple[GroupAccuracy, ...]
    datasets: tuple[GroupAccuracy, ...]
    sizes: tuple[GroupAccuracy, ...]
    regions: RegionFigures | None
    cost: CostFigures | None
    reliability: Reliability | None


def judge(results: Results, matcher: Matcher) -> list[Scored]:
    """Every result with what it is worth, in the question file's order.

    Raises:
        UsageError: A result names tiles that its level does not have.
    """
    return [_judged(result, results.header.tile, matcher) for result in results]


def _judged(result: Result, tile: int, matcher: Matcher) -> Scored:
    match = None
    if not result.error:
        match = matcher.match(result.text, result.ground_truth, result.choices)
    return Scored(result, match, _coverage(result, tile))


def _coverage(result: Result, tile: int) -> Coverage | None:
    if not result.hbox or result.work is None:
        return None
    work = result.work
    width, height = work.image_size
    # Where only the global view was looked at, no tile of a level was.
    finest = work.finest or FinestLevel(tile, tile, 1, 1, ())
    level = Level(finest.height, finest.width, finest.tile_rows, finest.tile_cols, tile)
    sides = (tile, level.height, level.width, width, height, level.tile_rows, level.tile_cols)
    sound = min(sides) > 0 and level.tile_count <= _MAX_TILES
    inside = all(
        0 <= row < level.tile_rows and 0 <= col < level.tile_cols for row, col in finest.tiles
    )
    if not (sound and inside):
        raise UsageError(
            f"the result of question {result.question_id!r} names tiles that its level does not "
            "have; the results file is damaged"
        )
    return coverage(result.hbox, level, (height, width), finest.tiles)


def score(results: Results, matcher: Matcher) -> Score:
    """All figures of a run.

    Args:
        results: The run's results.
        matcher: Decides what is right.

    Raises:
        UsageError: There is no result yet, or one is damaged.
    """
    scored = judge(results, matcher)
    if not scored:
        raise UsageError("the results file holds no answer yet; run the evaluation first")
    matches = [item.match for item in scored]
    return Score(
        header=results.header,
        overall=_group("overall", scored),
        exact=sum(match in ("exact", "choice") for match in matches),
        synonyms=matches.count("synonym"),
        knows_synonyms=matcher.knows_synonyms,
        errors=sum(bool(item.result.error) for item in scored),
        timeouts=sum(_timed_out(item.result) for item in scored),
        missing=max(results.header.questions.count - len(scored), 0),
        categories=_groups(scored, lambda item: item.result.category),
        datasets=_groups(scored, lambda item: item.result.dataset),
        sizes=_size_groups(scored),
        regions=region_figures(scored),
        cost=cost_figures(scored),
        reliability=reliability(
            [
                (item.result.confidence, item.correct)
                for item in scored
                if item.result.confidence is not None
            ]
        ),
    )


def _timed_out(result: Result) -> bool:
    return result.work is not None and result.work.finish_reason == "timeout"


def _group(name: str, scored: Sequence[Scored]) -> GroupAccuracy:
    by_category: dict[str, list[bool]] = {}
    for item in scored:
        by_category.setdefault(item.result.category, []).append(item.correct)
    shares = [sum(right) / len(right) for right in by_category.values()]
    correct = sum(item.correct for item in scored)
    return GroupAccuracy(name, len(scored), correct, sum(shares) / len(shares) if shares else 0.0)


def _groups(scored: Iterable[Scored], name: Callable[[Scored], str]) -> tuple[GroupAccuracy, ...]:
    members: dict[str, list[Scored]] = {}
    for item in scored:
        members.setdefault(name(item), []).append(item)
    return tuple(_group(key, members[key]) for key in sorted(members))


def _size_groups(scored: Iterable[Scored]) -> tuple[GroupAccuracy, ...]:
    groups = {group.name: group for group in _groups(scored, _size_bin)}
    return tuple(groups[name] for name in (*_bin_names(), UNKNOWN_SIZE) if name in groups)


def _bin_names() -> list[str]:
    bounds = zip((0, *SIZE_BINS), SIZE_BINS, strict=False)
    return [f"{low:,}-{high:,} px" for low, high in bounds] + [f"over {SIZE_BINS[-1]:,} px"]


def _size_bin(item: Scored) -> str:
    if item.result.work is None:
        return UNKNOWN_SIZE
    side = max(item.result.work.image_size)
    return _bin_names()[sum(side > bound for bound in SIZE_BINS)]


def region_figures(scored: Iterable[Scored]) -> RegionFigures | None:
    """Region recall of the questions that have evidence and an answer; None without any."""
    found = [item.coverage for item in scored if item.coverage is not None]
    if not found:
        return None
    count = len(found)
    return RegionFigures(
        questions=count,
        recall=sum(item.covered for item in found) / count,
        coverage=sum(item.share for item in found) / count,
        random_recall=sum(item.random_covered for item in found) / count,
        random_coverage=sum(item.random_share for item in found) / count,
    )


def cost_figures(scored: Iterable[Scored]) -> CostFigures | None:
    """Mean costs of the questions that were answered; None without any."""
    works = [item.result.work for item in scored if item.result.work is not None]
    if not works:
        return None
    counted = [work.flops for work in works if work.flops is not None]
    tflops = {}
    if len(counted) == len(works):
        for stage in ("vision", "rfm", "llm", "total"):
            tflops[stage] = _mean([getattr(flops, stage) for flops in counted]) / 1e12
    return CostFigures(
        questions=len(works),
        tiles=_mean([work.tiles_encoded + work.tiles_from_cache for work in works]),
        tiles_encoded=_mean([work.tiles_encoded for work in works]),
        tokens={
            field.name: _mean([getattr(work.tokens, field.name) for work in works])
            for field in fields(TokenCounts)
        },
        seconds={
            field.name: _mean([getattr(work.seconds, field.name) for work in works])
            for field in fields(Timings)
        },
        tflops=tflops,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
