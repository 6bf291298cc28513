"""The detector's thresholds follow what held-out images show."""

from __future__ import annotations

from typing import Any

import pytest

from tests.scripts import Importer


@pytest.fixture
def modules(real_scenes: Importer) -> tuple[Any, Any]:
    """The script, and the labels that it reads."""
    return real_scenes("thresholds"), real_scenes("labels")


def pictures(labels: Any, shown: list[int]) -> list[Any]:
    """Images of airport_338 with so many airplanes each."""
    box = (0.0, 0.0, 1.0, 1.0)
    return [
        labels.Labelled("airport_338", f"{i}.webp", 10, 10, {"airplane": (box,) * n} if n else {})
        for i, n in enumerate(shown)
    ]


def test_thresholds_tell_what_is_there_and_count_it(modules: tuple[Any, Any]) -> None:
    thresholds, labels = modules
    images = pictures(labels, [2] * 10 + [0] * 10)
    # Two real ones each and one false one below them; what is not there scores less still.
    scores = [{"airplane": [0.7, 0.65, 0.5]}] * 10 + [{"airplane": [0.4]}] * 10
    low, high = thresholds.fit("airplane", 0.3, 0.35, images, scores)
    assert 0.4 < low <= 0.7
    assert 0.5 < high <= 0.65
    assert low <= high


def test_few_images_change_nothing(modules: tuple[Any, Any]) -> None:
    thresholds, labels = modules
    images = pictures(labels, [2] * 3 + [0] * 3)
    scores = [{"airplane": [0.7]}] * 6
    assert thresholds.fit("airplane", 0.3, 0.35, images, scores) == (0.3, 0.35)
