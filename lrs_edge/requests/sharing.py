"""Sharing a tile budget over the levels of a search. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def share_tiles(budget: int, wanted: Sequence[int]) -> list[int]:
    """Tiles that each level may look at, from coarse to fine.

    The budget is shared as evenly as whole tiles allow, the finer level first where they do not; a
    level that wants less than its share leaves the rest to the others. With fewer tiles than levels
    the coarse levels go without, so that the finest is always reached.

    Args:
        budget: Tiles for all levels together, 0 or more.
        wanted: Tiles that each level would look at without a budget, at least 1 each.

    Returns:
        One number per level, at most what it wants; their sum is the budget, or all that is wanted.
        No number falls when the budget rises.
    """
    shares = [0] * len(wanted)
    left = min(budget, sum(wanted))
    # The finest comes first: it gets the odd tiles, and the only ones where they are few.
    open_levels = [index for index in reversed(range(len(wanted))) if wanted[index] > 0]
    while left:
        each = max(left // len(open_levels), 1)
        for index in open_levels:
            more = min(each, wanted[index] - shares[index], left)
            shares[index] += more
            left -= more
        open_levels = [index for index in open_levels if shares[index] < wanted[index]]
    return shares
