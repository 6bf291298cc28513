"""Options are checked once, where they enter."""

from __future__ import annotations

import pytest

from lrs_edge.errors import UsageError
from lrs_edge.requests.options import AskOptions, merged_options


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "fast"),
        ("resampling", "cubic"),
        ("max_tiles", -1),
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
        ("search", "best-first"),
        ("prune", "best"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "reference", "prune": "random"}, "--policy full"),
        ({"policy": "reference", "max_tiles": 9}, "leave --max-tiles out"),
        ({"policy": "reference", "search": "exhaustive"}, "--policy full"),
        ({"search": "exhaustive", "prune": "none"}, "--search pyramid"),
        ({"search": "exhaustive", "prune": "fastv"}, "--search pyramid"),
        ({"prune": "random", "prune_ratio": 0.5}, "--prune-ratio is for"),
        ({"prune_layers": (2,)}, "--prune-layers is for"),
        ({"prune": "fastv", "prune_ratio": 1.0}, "prune_ratio"),
        ({"prune": "fastv", "prune_ratio": float("nan")}, "prune_ratio"),
        ({"prune": "fastv", "prune_layers": (2, 4)}, "fastv cuts once"),
        ({"prune": "pdrop", "prune_layers": (4, 2)}, "ascend"),
        ({"prune": "pdrop", "prune_layers": ()}, "prune_layers"),
        ({"prune": "pdrop", "prune_layers": (0,)}, "prune_layers"),
        ({"prune": "pdrop", "kv_budget": 100}, "--kv-budget"),
        ({"prune": "visionzip", "prune_layers": (2,)}, "--prune-layers is for"),
        ({"prune": "visionzip", "prune_ratio": -0.5}, "prune_ratio"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        merged_options(None, options)


def test_no_tiles_at_all_can_be_meant() -> None:
    assert AskOptions(max_tiles=0).max_tiles == 0
