"""Scores and comparisons as a table for people, JSON or CSV. Knows no engines, no terminals."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import msgspec

from lrs_edge.evaluation.comparison import Comparison, GroupChange
from lrs_edge.evaluation.coverage import COVERED_SHARE
from lrs_edge.evaluation.reliability import BINS, Reliability
from lrs_edge.evaluation.results import RunHeader
from lrs_edge.evaluation.scoring import GroupAccuracy, Score

TableFormat = Literal["table", "json", "csv"]

_DIGITS = 6
#: Options that a reader wants to see are those that are not the default; shown in this order.
_MOST_OPTIONS = 8


def score_text(score: Score, form: TableFormat) -> str:
    """A score in one of the forms, with a newline at the end."""
    if form == "table":
        return _score_table(score)
    facts = score_facts(score)
    return as_json(facts) if form == "json" else _csv(_long(facts))


def comparison_text(comparison: Comparison, form: TableFormat) -> str:
    """A comparison in one of the forms, with a newline at the end."""
    if form == "table":
        return _comparison_table(comparison)
    facts = comparison_facts(comparison)
    return as_json(facts) if form == "json" else _csv(_long(facts))


def score_facts(score: Score) -> dict[str, Any]:
    """A score as plain values: shares are 0..1, times seconds, operations 10^12."""
    return {
        "run": _run_facts(score.header),
        "overall": {
            "questions": score.overall.questions,
            "correct": score.overall.correct,
            "accuracy": score.overall.accuracy,
            "average_accuracy": score.overall.average,
            "exact": score.exact,
            "synonyms": score.synonyms if score.knows_synonyms else None,
            "errors": score.errors,
            "timeouts": score.timeouts,
            "missing": score.missing,
        },
        "categories": {group.name: _group_facts(group) for group in score.categories},
        "datasets": {group.name: _group_facts(group) for group in score.datasets},
        "sizes": {group.name: _group_facts(group) for group in score.sizes},
        "regions": None if score.regions is None else asdict(score.regions),
        "cost": None if score.cost is None else asdict(score.cost),
        "reliability": reliability_facts(score.reliability),
    }


def reliability_facts(found: Reliability | None) -> dict[str, Any] | None:
    """A reliability table as plain values, its bins by their bounds."""
    if found is None:
        return None
    bins = {f"{part.low:.1f}-{part.high:.1f}": asdict(part) for part in found.bins}
    return asdict(found) | {"bins": bins}


def comparison_facts(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values; `difference` is the second run minus the first."""
    return {
        "first": _run_facts(comparison.first),
        "second": _run_facts(comparison.second),
        "overall": _change_facts(comparison.overall)
        | {
            "won": len(comparison.won),
            "lost": len(comparison.lost),
            "p_value": comparison.p_value,
        },
        "categories": {change.name: _change_facts(change) for change in comparison.categories},
        "datasets": {change.name: _change_facts(change) for change in comparison.datasets},
        "regions": _pair_facts(comparison.regions),
        "costs": _pair_facts(comparison.costs),
        "won": list(comparison.won),
        "lost": list(comparison.lost),
    }


def _run_facts(header: RunHeader) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(header)
    return {name: facts[name] for name in ("model", "manifest_sha256", "lrs_edge", "provider")} | {
        "questions": facts["questions"],
        "options": facts["options"],
    }


def _group_facts(group: GroupAccuracy) -> dict[str, Any]:
    return {
        "questions": group.questions,
        "correct": group.correct,
        "accuracy": group.accuracy,
        "average_accuracy": group.average,
    }


def _change_facts(change: GroupChange) -> dict[str, Any]:
    return {
        "questions": change.questions,
        "first": change.first,
        "second": change.second,
        "difference": change.difference,
    }


def _pair_facts(pair: tuple[Any, Any]) -> dict[str, Any]:
    first, second = (None if part is None else asdict(part) for part in pair)
    return {"first": first, "second": second}


def as_json(facts: dict[str, Any]) -> str:
    """Plain values as indented JSON, fractions shortened."""
    return msgspec.json.format(msgspec.json.encode(_rounded(facts)), indent=2).decode() + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return value


def _long(facts: dict[str, Any]) -> list[tuple[str, str, str, Any]]:
    """One row per figure: section, name, metric, value."""
    figures = {
        section: part
        for section, part in _rounded(facts).items()
        if isinstance(part, dict) and section not in ("run", "first", "second")
    }
    return [(path[0], "/".join(path[1:-1]), path[-1], value) for path, value in _leaves(figures)]


def _leaves(facts: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every single value with the names that lead to it."""
    for name, part in facts.items():
        if isinstance(part, dict):
            yield from (((name, *path), value) for path, value in _leaves(part))
        else:
            yield (name,), part


def _csv(rows: Iterable[tuple[str, str, str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("section", "name", "metric", "value"))
    writer.writerows((s, _cell(name), metric, _empty(value)) for s, name, metric, value in rows)
    return stream.getvalue()


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _empty(value: Any) -> Any:
    return "" if value is None else value


def _score_table(score: Score) -> str:
    overall = score.overall
    lines = [*_run_lines("run", score.header), ""]
    rule = "exact or synonym" if score.knows_synonyms else "exact matches only"
    if score.header.questions.format == "mme-realworld":
        rule = "letter of the choice"
    kinds = counted(len(score.categories), "category", "categories")
    lines += [
        f"accuracy          {percent(overall.accuracy)}   {overall.correct} of "
        f"{overall.questions} ({rule})",
        f"average accuracy  {percent(overall.average)}   over {kinds}",
    ]
    if score.synonyms:
        lines.append(f"of these          {score.exact} exact, {score.synonyms} by synonyms")
    counts = (
        (score.errors, "failed, counted as wrong"),
        (score.missing, "not asked yet"),
        (score.timeouts, "cut short by --timeout"),
    )
    lines += [f"questions         {count} {what}" for count, what in counts if count]
    lines += _group_lines("category", score.categories, average=False)
    lines += _group_lines("dataset", score.datasets, average=True)
    lines += _group_lines("image's long side", score.sizes, average=True)
    lines += [*_region_lines(score), *_cost_lines(score), *reliability_lines(score.reliability)]
    return "\n".join(lines) + "\n"


def _run_lines(title: str, header: RunHeader) -> list[str]:
    from lrs_edge.requests.options import AskOptions

    usual = msgspec.to_builtins(asdict(AskOptions()))
    changed = [
        f"{name.replace('_', '-')} {value}"
        for name, value in header.options.items()
        if value != usual.get(name) and name != "end_str"
    ]
    shown = ", ".join(changed[:_MOST_OPTIONS]) or "default options"
    return [
        f"{title}: {header.model} ({header.manifest_sha256[:8]}, lrs-edge {header.lrs_edge}, "
        f"{header.provider}) on {header.questions.file}; {shown}"
    ]


def _group_lines(title: str, groups: Sequence[GroupAccuracy], *, average: bool) -> list[str]:
    if not groups:
        return []
    header = [title, "questions", "correct", "accuracy", *(["average"] if average else [])]
    rows = [
        [
            _plain(group.name),
            str(group.questions),
            str(group.correct),
            percent(group.accuracy),
            *([percent(group.average)] if average else []),
        ]
        for group in groups
    ]
    return ["", *aligned([header, *rows])]


def _region_lines(score: Score) -> list[str]:
    regions = score.regions
    if regions is None:
        return []
    header = [f"evidence ({counted(regions.questions, 'question')})", "search", "random tiles"]
    rows = [
        [
            f"recall (at least {COVERED_SHARE:.0%} of the area)",
            percent(regions.recall),
            percent(regions.random_recall),
        ],
        ["mean share covered", percent(regions.coverage), percent(regions.random_coverage)],
    ]
    return ["", *aligned([header, *rows])]


def reliability_lines(found: Reliability | None) -> list[str]:
    """Expected calibration error and the reliability table; nothing where there is none."""
    if found is None:
        return []
    header = ["confidence", "questions", "mean", "right"]
    rows = [
        [
            f"{part.low:.1f} to {part.high:.1f}",
            str(part.questions),
            percent(part.confidence),
            percent(part.accuracy),
        ]
        for part in found.bins
    ]
    every = ["all", str(found.questions), percent(found.confidence), percent(found.accuracy)]
    return [
        "",
        *aligned([header, *rows, every]),
        f"expected calibration error {percent(found.calibration_error).strip()} "
        f"({len(found.bins)} of {BINS} bins)",
    ]


def _cost_lines(score: Score) -> list[str]:
    cost = score.cost
    if cost is None:
        return []
    tokens, seconds, tflops = cost.tokens, cost.seconds, cost.tflops
    stages = ", ".join(
        f"{name} {seconds[name]:.2f}" for name in ("read", "encode", "score", "prefill", "decode")
    )
    rows = [
        ["mean per question", ""],
        ["tiles", f"{cost.tiles:.1f} looked at, {cost.tiles_encoded:.1f} of them encoded"],
        [
            "vision tokens",
            f"{tokens['seen']:.0f} in all tiles of the levels, {tokens['encoded']:.0f} "
            f"looked at, {tokens['sent']:.0f} sent to the language model",
        ],
        ["text tokens", f"{tokens['text']:.1f} in, {tokens['generated']:.1f} generated"],
        ["seconds", f"{seconds['total']:.2f} ({stages})"],
        [
            "TFLOPs",
            f"{tflops['total']:.4f} (vision {tflops['vision']:.4f}, rfm {tflops['rfm']:.4f}, llm "
            f"{tflops['llm']:.4f})"
            if tflops
            else "unknown: the bundle does not hold its sizes; export it again",
        ],
    ]
    return ["", *aligned(rows, left=2)]


def _comparison_table(comparison: Comparison) -> str:
    overall = comparison.overall
    lines = [*_run_lines("A", comparison.first), *_run_lines("B", comparison.second)]
    changes = (overall, *comparison.categories)
    lines += _change_lines("category", changes)
    if len(comparison.datasets) > 1:
        lines += _change_lines("dataset", comparison.datasets)
    lines += [
        "",
        f"B won {len(comparison.won)} and lost {len(comparison.lost)} of "
        f"{counted(overall.questions, 'question')}; McNemar's exact test: "
        f"p = {comparison.p_value:.4g}",
    ]
    lines += _side_by_side(comparison)
    return "\n".join(lines) + "\n"


def _side_by_side(comparison: Comparison) -> list[str]:
    """Region recall and costs of both runs, where both have them."""
    rows: list[list[str]] = []
    first, second = comparison.regions
    if first is not None and second is not None:
        rows.append(["region recall", percent(first.recall), percent(second.recall)])
        chance = (percent(first.random_recall), percent(second.random_recall))
        rows.append(["  of random tiles", *chance])
    one, other = comparison.costs
    if one is not None and other is not None:
        rows.append(["tiles looked at", f"{one.tiles:.1f}", f"{other.tiles:.1f}"])
        both = (one, other)
        rows.append(["vision tokens sent", *(f"{cost.tokens['sent']:.0f}" for cost in both)])
        rows.append(["seconds", *(f"{cost.seconds['total']:.2f}" for cost in both)])
        if one.tflops and other.tflops:
            rows.append(["TFLOPs", *(f"{cost.tflops['total']:.4f}" for cost in both)])
    return ["", *aligned([["mean per question", "A", "B"], *rows])] if rows else []


def _change_lines(title: str, changes: Sequence[GroupChange]) -> list[str]:
    rows = [[title, "questions", "A", "B", "B - A"]]
    rows += [
        [
            _plain(change.name),
            str(change.questions),
            percent(change.first),
            percent(change.second),
            f"{100 * change.difference:+.1f}",
        ]
        for change in changes
    ]
    return ["", *aligned(rows)]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Columns under each other; the first `left` to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _plain(name: str) -> str:
    """A name from the question file on one line of sane length."""
    shown = " ".join(name.split())
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def counted(number: int, one: str, more: str = "") -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def percent(share: float) -> str:
    """A share of 0..1 in per cent, as wide as 100.0 %."""
    return f"{100 * share:5.1f} %"
