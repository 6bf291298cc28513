"""Choosing the next token from logits. Pure numpy functions."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.yes_no import YesNo


class Chooser(Protocol):
    """Chooses tokens."""

    def choose(self, logits: NDArray[np.float32], generated: list[int]) -> int:
        """The id of the token after those that were generated, given its logits float32 [V]."""
        ...


class Sampler:
    """Greedy decoding at temperature 0, nucleus sampling above it; the same seed, the same text.

    Args:
        temperature: 0 for greedy.
        top_p: Nucleus, above 0 and at most 1.
        seed: Of the random generator.
        repetition_penalty: As in transformers: logits of tokens generated before are divided by it
            where positive and multiplied where negative; it applies to greedy decoding too.
        penalised_ids: Tokens that count as generated from the start.
    """

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        repetition_penalty: float = 1.0,
        penalised_ids: tuple[int, ...] = (),
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._penalty = repetition_penalty
        self._penalised_ids = penalised_ids
        self._random = np.random.default_rng(seed)

    def choose(self, logits: NDArray[np.float32], generated: list[int]) -> int:
        """The next token's id.

        Args:
            logits: float32 [V].
            generated: Ids generated so far.
        """
        if self._penalty != 1.0:
            logits = self._penalised(logits, [*self._penalised_ids, *generated])
        if self._temperature == 0:
            return int(np.argmax(logits))
        # The largest is subtracted first: dividing by a tiny temperature could overflow.
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore", under="ignore"):
            weights = np.exp(below / self._temperature)
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        nucleus = order[: int(np.searchsorted(mass, self._top_p)) + 1]
        share = weights[nucleus] / weights[nucleus].sum()
        return int(self._random.choice(nucleus, p=share))

    def _penalised(self, logits: NDArray[np.float32], generated: list[int]) -> NDArray[np.float32]:
        seen = np.unique(np.array(generated, np.int64))
        changed = logits.copy()
        values = changed[seen]
        changed[seen] = np.where(values > 0, values / self._penalty, values * self._penalty)
        return changed


class TokenChooser:
    """A sampler that remembers how likely its choices were, and decides yes or no by a threshold.

    Args:
        sampler: Chooses tokens.
        yes_no: Tokens that say yes and no; None measures no margin.
        threshold: Where the first token is one of those, it is decided by whether the margin is
            above this; None leaves it to the sampler.

    Attributes:
        margin: Of the first token, see `YesNo.margin`.
        log_probabilities: Natural logarithm of the probability of every token chosen, before
            temperature, nucleus and penalty; a stop token included.
    """

    def __init__(self, sampler: Sampler, yes_no: YesNo | None, threshold: float | None) -> None:
        self._sampler = sampler
        self._yes_no = yes_no
        self._threshold = threshold
        self.margin: float | None = None
        self.log_probabilities: list[float] = []

    def choose(self, logits: NDArray[np.float32], generated: list[int]) -> int:
        """As `Sampler.choose`."""
        token = self._sampler.choose(logits, generated)
        if self._yes_no is not None and not generated:
            self.margin = self._yes_no.margin(logits, token)
            if self.margin is not None and self._threshold is not None:
                token = self._yes_no.token(logits, yes=self.margin > self._threshold)
        self.log_probabilities.append(log_probability(logits, token))
        return token


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Natural logarithm of a token's share in the softmax of logits float32 [V]."""
    # In double precision: the difference of two logits could overflow.
    below = logits.astype(np.float64) - float(logits.max())
    return float(below[token]) - math.log(float(np.exp(below).sum()))
