"""What one question may cost: time, tiles, vision tokens, answer tokens, memory.

One object per question, asked between tiles, levels, parts of a prefill, and tokens. Under a time
limit the search leaves what prefill and a first answer need, by rates that are measured while the
engine runs (`rates.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lrs_edge.answer.answer import SearchEnd
from lrs_edge.errors import CancelledError
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import AskOptions
from lrs_edge.requests.rates import Rates
from lrs_edge.requests.sharing import share_tiles

#: Share of the time left when a question's turn comes that the search may use where nothing is
#: measured yet.
SEARCH_SHARE = 0.6

#: Measured times are multiplied by this before anything is promised on them: the machine may be
#: busier in a moment, and longer prompts cost more per token.
MARGIN = 1.3

#: Tokens of an answer that the search leaves time for before any answer was seen; afterwards twice
#: what answers have had, and never fewer than the second number.
ANSWER_TOKENS, LEAST_ANSWER_TOKENS = 32, 16

#: Tokens of an answer that a prefill leaves time for, and that are generated even where the prefill
#: took longer than it should have.
FIRST_TOKENS = 4

#: Share of the time limit by which it may be passed for these first tokens.
GRACE = 0.25

#: Tiles that make a finer level worth going to when time is short.
WORTHWHILE_TILES = 4


@dataclass(frozen=True)
class ModelCosts:
    """What a model computes for a question, in the units of `Rates`.

    Attributes:
        vision: Path of the vision graph in the bundle.
        rfm: Path of the RFM's graph.
        llm: Path of the language model's graph.
        rfm_share: Layers of the RFM for one of the language model: a guess at its time.
        per_tile: Local tokens of a tile.
        keep_ratio: Share of them that is kept.
    """

    vision: str
    rfm: str
    llm: str
    rfm_share: float
    per_tile: int
    keep_ratio: float


class Budget:
    """What one question may still cost.

    Args:
        options: The limits that the caller set.
        clock: Started when the question was submitted.
        rates: How fast the engine is; None where no time limit can be kept by them.
        costs: What they are rates of.
        is_given_up: True when nobody wants the answer any more.
        lacks_memory: True when nothing large may be allocated any more; asked between levels.
    """

    def __init__(
        self,
        options: AskOptions,
        clock: Clock,
        rates: Rates | None = None,
        costs: ModelCosts | None = None,
        *,
        is_given_up: Callable[[], bool] = lambda: False,
        lacks_memory: Callable[[], bool] = lambda: False,
    ) -> None:
        self._options = options
        self.clock = clock
        self._rates = rates
        self._costs = costs
        self._is_given_up = clock.is_given_up = is_given_up
        self.lacks_memory = lacks_memory
        self._rest = 0.0 if clock.timeout is None else (1 - SEARCH_SHARE) * clock.left
        self._question = 0
        self._note = 0
        self._kept = 0
        self._read = 0.0

    @property
    def is_timed(self) -> bool:
        """Whether there is a time limit."""
        return self.clock.timeout is not None

    # Time.

    def check(self) -> None:
        """Stop here if nobody wants the answer any more.

        Raises:
            CancelledError: Nobody does.
        """
        if self._is_given_up():
            raise CancelledError("nobody waits for this answer any more")

    def expired(self) -> bool:
        """True when the time limit is over, or nobody wants the answer any more."""
        return self.clock.expired()

    def search_over(self) -> bool:
        """True when the search must end so that prefill and a first answer come in time."""
        return self._is_given_up() or self._search_left() <= 0

    def asked(self, question: int) -> None:
        """Tell how many tokens of the question follow the image."""
        self._question = question

    def noted(self, note: int) -> None:
        """Tell how many tokens say what was found; the language model alone reads them."""
        self._note = note

    def found(self, kept: int) -> None:
        """Tell how many local tokens would be sent if the search ended now."""
        self._kept = kept

    def has_read(self, seconds: float) -> None:
        """Tell how long reading a tile of the level that is looked at takes."""
        self._read = seconds

    def can_score(self, tokens: int) -> bool:
        """True when local tokens and the question after them can be scored in time."""
        left = self.clock.left - MARGIN * self._answer_seconds(self._kept)
        return left > MARGIN * self._score * (tokens + self._question)

    def affordable_tiles(self, remembered: int, unseen: int, narrowing: float = 1.0) -> int | None:
        """Tiles that can be read, encoded, scored and sent in time; None without a time limit.

        Args:
            remembered: Tiles whose tokens are known: they are only scored and sent.
            unseen: Tokens that scoring runs besides those of the tiles and the question; below 0
                where it need not run all of the tiles'.
            narrowing: How much less of the image a tile shows than one that was read last.
        """
        if not self.is_timed or self._rates is None or self._costs is None:
            return None
        costs = self._costs
        encode = self._rates.tile(costs.vision) or 0.0
        look = encode + self._read * narrowing
        use = (self._score + self._prefill * costs.keep_ratio) * costs.per_tile
        if look + use <= 0:
            # Nothing was ever measured, so nothing can be said.
            return None
        # A tile's worth of tokens for the newlines.
        fixed = self._score * (unseen + self._question + costs.per_tile)
        left = self._search_left(kept=0) / MARGIN - fixed
        if left <= remembered * use:
            return max(int(left / use), 0) if use > 0 else remembered
        return remembered + int((left - remembered * use) / (look + use))

    def affordable_tokens(self) -> int | None:
        """Local tokens that can be sent with time for a first answer; None without a limit."""
        if not self.is_timed or self._prefill <= 0:
            return None
        left = self.clock.left - MARGIN * self._first_seconds()
        return max(int(left / (MARGIN * self._prefill)), 0)

    def can_run(self, tokens: int) -> bool:
        """True when so many more tokens of a prompt leave time for a first answer."""
        if not self.is_timed:
            return True
        return self.clock.left > MARGIN * (self._first_seconds() + self._prefill * tokens)

    def answers_late(self) -> bool:
        """True when the first tokens of an answer are worth passing the time limit a little."""
        timeout = self.clock.timeout
        if timeout is None or self._is_given_up():
            return False
        return self.clock.left + GRACE * timeout > self._first_seconds()

    def _search_left(self, kept: int | None = None) -> float:
        """Seconds that the search may still take."""
        if self._prefill == 0 or self._step == 0:
            return self.clock.left - self._rest
        return self.clock.left - MARGIN * self._answer_seconds(self._kept if kept is None else kept)

    def _answer_seconds(self, sent: int) -> float:
        """Prefill of local tokens, note and question, and a usual answer."""
        usual = None if self._rates is None else self._rates.answer_tokens
        tokens = ANSWER_TOKENS if usual is None else max(2 * usual, LEAST_ANSWER_TOKENS)
        steps = 1 + min(tokens, self._options.max_tokens)
        return self._prefill * (sent + self._note + self._question) + self._step * steps

    def _first_seconds(self) -> float:
        """Prefill of note and question, and the first tokens."""
        tokens = min(FIRST_TOKENS, self._options.max_tokens)
        return self._prefill * (self._note + self._question) + self._step * (1 + tokens)

    @property
    def knows_steps(self) -> bool:
        """Whether the time of a generated token is known."""
        return self._step > 0

    @property
    def _prefill(self) -> float:
        """Seconds per token of the language model's prefill."""
        if self._rates is None or self._costs is None:
            return 0.0
        return self._rates.token(self._costs.llm) or 0.0

    @property
    def _score(self) -> float:
        """Seconds per token of the RFM."""
        if self._rates is None or self._costs is None:
            return 0.0
        return self._rates.token(self._costs.rfm) or self._prefill * self._costs.rfm_share

    @property
    def _step(self) -> float:
        """Seconds per generated token."""
        if self._rates is None or self._costs is None:
            return 0.0
        return self._rates.step(self._costs.llm) or 0.0

    # Tiles.

    def tiles_left(self, looked_at: int) -> int | None:
        """Tiles that `max_tiles` still allows; None for no limit.

        Args:
            looked_at: Tiles looked at so far, the global view included.
        """
        most = self._options.max_tiles
        return None if most is None else max(most - looked_at, 0)

    def share(self, looked_at: int, wanted: Sequence[int]) -> tuple[list[int], SearchEnd | None]:
        """Tiles that each level to come may look at.

        Args:
            looked_at: Tiles looked at so far, the global view included.
            wanted: Tiles that each level to come would look at, coarse to fine.

        Returns:
            A number per level, and the limit that made one smaller than wanted, or None.
        """
        left = self.tiles_left(looked_at)
        if left is None or left >= sum(wanted):
            return list(wanted), None
        return share_tiles(left, wanted), "max_tiles"
