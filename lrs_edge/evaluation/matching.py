"""Whether an answer is right, as the authors of LRS-VQA and of MME-RealWorld decide it.

Sources: `are_synonyms` and `evaluate_dataset` in LRS-VQA's Script/evaluation_LRSVQA.py, and
`extract_characters_regex` in MME-RealWorld's evaluation/eval_your_results.py; docs/eval.md says
where this differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

#: How an answer was right; None where it was wrong.
Match = Literal["exact", "synonym", "choice"]

#: Two words are synonyms where two of their senses are more alike than this. A path between two
#: different senses has at least one step, and then 1 / (1 + 1) at most, so: where they share one.
SYNONYM_SIMILARITY = 0.8

#: What the authors cut from an answer before they look for a letter. Two commas are missing in
#: their list, so that four of their phrases became two that no answer holds; done as they do it.
_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
_LETTERS = re.compile("[ABCDE]")
#: An answer of more words without a letter is not a choice.
_MOST_WORDS = 10


class Synonyms(Protocol):
    """Knows how alike the senses of two words are."""

    def similarity(self, first: str, second: str) -> float:
        """Largest similarity of any sense of one word and any of the other, 0..1; 0 if unknown."""
        ...


class Matcher:
    """Decides whether answers are right.

    Args:
        synonyms: Knows synonyms; None counts exact matches only.
    """

    def __init__(self, synonyms: Synonyms | None) -> None:
        self._synonyms = synonyms
        self._known: dict[tuple[str, str], bool] = {}

    @property
    def knows_synonyms(self) -> bool:
        """Whether synonyms count."""
        return self._synonyms is not None

    def match(self, answer: str, ground_truth: str, choices: Sequence[str] = ()) -> Match | None:
        """How an answer is right, None where it is wrong.

        Args:
            answer: What the model said.
            ground_truth: The right answer, or its letter.
            choices: The choices of a multiple-choice question.
        """
        if choices:
            return "choice" if chosen_letter(answer, choices) == ground_truth else None
        said, right = normalise(answer), normalise(ground_truth)
        if said == right:
            return "exact"
        return "synonym" if self._are_synonyms(said, right) else None

    def _are_synonyms(self, said: str, right: str) -> bool:
        if self._synonyms is None:
            return False
        pair = (said, right)
        if pair not in self._known:
            self._known[pair] = self._synonyms.similarity(said, right) > SYNONYM_SIMILARITY
        return self._known[pair]


def normalise(text: str) -> str:
    """An answer as it is compared: lower case, without white space at the ends, single spaces."""
    return " ".join(text.lower().split())


def chosen_letter(answer: str, choices: Sequence[str]) -> str:
    """The letter that an answer names, as MME-RealWorld's authors find it; empty where none.

    Args:
        answer: What the model said.
        choices: Choices such as `(A) 12`; an answer without a letter is looked for in them.
    """
    said = answer.strip()
    for prefix in _PREFIXES:
        said = said.replace(prefix, "")
    found = _LETTERS.search(said)
    if found is not None:
        return found[0]
    # Nothing is in every choice, and so are a bracket or a full stop that --timeout cut off: the
    # authors count them as the first choice.
    if len(said.split()) > _MOST_WORDS or not any(char.isalnum() for char in said):
        return ""
    said = said.strip()
    # The authors take the second character of the first choice that holds the answer.
    return next((choice[1:2] for choice in choices if said.lower() in choice.lower()), "")
