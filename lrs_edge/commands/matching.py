"""Options that say which answers are right, for the commands that score answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from lrs_edge.evaluation.matching import Matcher
    from lrs_edge.evaluation.question_formats import QuestionFormat

Decorated = TypeVar("Decorated", bound=Callable[..., object])

_SYNONYMS = click.option(
    "--no-synonyms",
    "synonyms",
    flag_value=False,
    default=True,
    type=bool,
    help="Count exact matches only; WordNet is not needed.",
)
_WORDNET = click.option(
    "--wordnet",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of WordNet's files; default: NLTK's data, else /usr/share/wordnet.",
)


def matching_options(command: Decorated) -> Decorated:
    """Decorator that adds `--no-synonyms` (`synonyms`) and `--wordnet`."""
    return _SYNONYMS(_WORDNET(command))


def choose_matcher(question_format: QuestionFormat, values: dict[str, Any]) -> Matcher:
    """What decides which answers are right.

    Args:
        question_format: Of the question file.
        values: Of a command with `matching_options`.

    Raises:
        UsageError: WordNet is asked for and missing.
    """
    from lrs_edge.evaluation.matching import Matcher

    if not values["synonyms"] or question_format == "mme-realworld":
        return Matcher(None)
    from lrs_edge.evaluation.wordnet import WordNet

    return Matcher(WordNet(values["wordnet"]))
