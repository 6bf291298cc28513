"""How fast an engine's graphs run, measured while they run.

One instance belongs to an engine and learns from every question, so that a later one knows from the
start what a prefill will take; the first knows it from its own first steps.
"""

from __future__ import annotations

#: Weight of the newest measurement. High, since what else the machine does changes quickly.
NEWEST = 0.5

#: A run of fewer new tokens says little of long ones: most of its time is reading the weights.
FEWEST_TOKENS = 32


class Rates:
    """Seconds per tile, per token of a long run, and per run of a single token, of each graph.

    Also how long answers get: a search that left time for `max_tokens` would leave far too much.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], float] = {}
        #: Tokens of a usual answer; None before the first one that came to its end.
        self.answer_tokens: float | None = None

    def answered(self, tokens: int) -> None:
        """Learn how long an answer that came to its end was."""
        known = tokens if self.answer_tokens is None else self.answer_tokens
        self.answer_tokens = NEWEST * tokens + (1 - NEWEST) * known

    def measured(self, graph: str, seconds: float, *, tiles: int = 0, tokens: int = 0) -> None:
        """Learn from one run.

        Args:
            graph: The graph's path in the bundle.
            seconds: What the run took.
            tiles: Tiles that went through it.
            tokens: New tokens that went through it.
        """
        if tiles:
            self._learn((graph, "tile"), seconds / tiles)
        if tokens >= FEWEST_TOKENS:
            self._learn((graph, "token"), seconds / tokens)
        elif tokens == 1:
            self._learn((graph, "step"), seconds)

    def _learn(self, key: tuple[str, str], seconds: float) -> None:
        known = self._seconds.get(key, seconds)
        self._seconds[key] = NEWEST * seconds + (1 - NEWEST) * known

    def tile(self, graph: str) -> float | None:
        """Seconds that a tile takes; None where none has run."""
        return self._seconds.get((graph, "tile"))

    def token(self, graph: str) -> float | None:
        """Seconds that a token of a long run takes; None where there was no such run."""
        return self._seconds.get((graph, "token"))

    def step(self, graph: str) -> float | None:
        """Seconds that a run of a single token takes; None where there was none."""
        return self._seconds.get((graph, "step"))
