"""Answers that begin with yes or no: which tokens say so, and which of the two to say."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from lrs_edge.language.prompt import Prompt

Logits = NDArray[np.float32]

_SPELLINGS = (str.lower, str.capitalize, str.upper)


@dataclass(frozen=True)
class YesNo:
    """Tokens that are the whole word yes, and the whole word no.

    Attributes:
        yes_ids: Tokens that say yes.
        no_ids: Tokens that say no.
    """

    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]

    def margin(self, logits: Logits, token: int) -> float | None:
        """How much rather yes than no: the largest logit of yes less the largest of no.

        Args:
            logits: float32 [V] of an answer's first token.
            token: The token that they would give.

        Returns:
            None where that is neither yes nor no, or no token says one of the two.
        """
        if not (self.yes_ids and self.no_ids) or token not in (*self.yes_ids, *self.no_ids):
            return None
        return float(logits[list(self.yes_ids)].max()) - float(logits[list(self.no_ids)].max())

    def token(self, logits: Logits, *, yes: bool) -> int:
        """The likeliest of the tokens that say yes, or of those that say no."""
        ids = self.yes_ids if yes else self.no_ids
        return ids[int(np.argmax(logits[list(ids)]))]


def yes_no_tokens(prompt: Prompt) -> YesNo:
    """The tokens that a tokenizer has for yes and no: small, capital, all capitals, after a space.

    A word that takes several tokens is not among them, so a set may be empty.
    """
    return YesNo(_single_tokens(prompt, "yes"), _single_tokens(prompt, "no"))


def _single_tokens(prompt: Prompt, word: str) -> tuple[int, ...]:
    found = []
    for before, spelling in product(("", " "), _SPELLINGS):
        ids = prompt.encode(before + spelling(word)).tolist()
        # SentencePiece puts the space before every text; an unknown word may become nothing else.
        if len(ids) == 1 and prompt.decode(ids).strip().lower() == word:
            found += ids
    return tuple(dict.fromkeys(found))
