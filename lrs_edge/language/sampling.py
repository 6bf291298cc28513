"""Choosing the next token from logits. Pure numpy functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
