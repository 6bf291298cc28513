"""Options are checked once, where they enter."""

from __future__ import annotations

import pytest

from lrs_edge.errors import UsageError
from lrs_edge.options import AskOptions, merged_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "fast"),
        ("resampling", "cubic"),
        ("max_tiles", 0),
        ("max_tiles", 1.5),
        ("kv_budget", -1),
        ("max_tokens", 0),
        ("timeout", 0),
        ("timeout", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", -1),
    ],
)
def test_values_that_cannot_be_meant_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        merged_options(None, {name: value})


def test_unknown_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"max_tile.*max_tiles"):
        merged_options(None, {"max_tile": 3})


def test_overrides_replace_single_values() -> None:
    base = AskOptions(max_tiles=5, seed=3)
    assert merged_options(base, {"seed": 4}) == AskOptions(max_tiles=5, seed=4)
    assert merged_options(None, {}) == AskOptions()
