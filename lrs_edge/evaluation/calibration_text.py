"""A fitted calibration as a table for people, or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import msgspec

from lrs_edge.bundle.calibration import Calibration, Domain
from lrs_edge.evaluation.calibration import Fit
from lrs_edge.evaluation.tables import (
    aligned,
    as_json,
    counted,
    percent,
    reliability_facts,
    reliability_lines,
)

CalibrationFormat = Literal["table", "json"]


def calibration_text(
    fitted: Fit | None, calibration: Calibration, images: int | None, form: CalibrationFormat
) -> str:
    """What was fitted, and how good it is, with a newline at the end.

    Args:
        fitted: To answers; None where nothing was.
        calibration: That was written.
        images: Of which its domain is; None where that was not looked at.
        form: Table or JSON.
    """
    if form == "json":
        return as_json(_facts(fitted, calibration, images))
    lines = [] if fitted is None else _fit_lines(fitted)
    if calibration.domain is not None:
        lines += (
            ["", *_domain_lines(calibration.domain, images)]
            if lines
            else _domain_lines(calibration.domain, images)
        )
    return "\n".join(lines) + "\n"


def _facts(fitted: Fit | None, calibration: Calibration, images: int | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "calibration": msgspec.to_builtins(calibration),
        "domain_images": images,
        "yes_no": None,
        "open": None,
        "left_out": None,
        "notes": [],
    }
    if fitted is not None:
        facts |= {
            "yes_no": None if fitted.yes_no is None else asdict(fitted.yes_no),
            "open": {"questions": fitted.open_questions, "correct": fitted.open_right},
            "left_out": reliability_facts(fitted.left_out),
            "notes": list(fitted.notes),
        }
    return facts


def _fit_lines(fitted: Fit) -> list[str]:
    rows = []
    figures, values = fitted.yes_no, fitted.calibration.yes_no
    if figures is not None and values is not None:
        rows += [
            [f"yes or no ({counted(figures.questions, 'question')})", "balanced accuracy"],
            ["  by the larger logit", percent(figures.by_logits)],
            [f"  by the threshold {values.threshold:.3f}", percent(figures.by_threshold)],
            ["  by thresholds fitted without the question", percent(figures.left_out)],
        ]
    if fitted.open_questions:
        share = percent(fitted.open_right / fitted.open_questions)
        rows.append([f"other answers ({counted(fitted.open_questions, 'question')}), right", share])
    lines = aligned(rows) if rows else []
    lines += reliability_lines(fitted.left_out)
    if fitted.left_out is not None:
        lines.append("(of questions that were left out of the fit in turn)")
    return lines


def _domain_lines(domain: Domain, images: int | None) -> list[str]:
    known = ", ".join(f"{low:g} to {high:g}" for low, high in domain.resolutions)
    lines = [f"ground resolution: {known} m a pixel" if known else "ground resolution: any"]
    if domain.colours is not None:
        of = "" if images is None else f", of {counted(images, 'image')}"
        lines.append(f"colours: distance up to {domain.colours.limit:.1f}{of}")
    return lines
