"""Questions about real pictures with boxes, with short answers and the boxes that show them.

Everything that can be asked of one kind is gathered as `Offer`s; one is drawn so that answers stay
balanced over all pictures (`Balance`), and then worded. A picture is a dictionary:

    regions   [{"label": one of `boxed_things.CONCEPTS`' labels, "box": [x0, y0, x1, y1] in shares}]
    complete  labels that are boxed wherever they occur: absence and counts hold for these alone
    cover     optional: {land cover: 3 x 3 shares of each ninth's own area that it covers}
    area      optional: "rural" or "urban"
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import boxed_cover as cover
import boxed_kinds as kinds
import boxed_relations as relations
import boxed_wording as words
from boxed_offers import POSITIONS, SOME, YES_NO, Offer, Speaker
from boxed_things import Balance, every_name
from questions import PictureQuestion

KINDS = {
    "presence": 6.0, "half": 2.0, "side": 4.0, "where": 4.0, "count": 6.0, "part count": 1.0,
    "extreme": 1.0, "category": 1.5, "finer": 0.7, "relation": 1.2, "beside": 1.0, "larger": 0.7,
    "side of": 0.7, "more": 0.8, "option": 0.8, "objects": 0.6, "reasoning": 0.8, "shape": 0.15,
    "area": 0.3, "cover": 4.0,
}  # fmt: skip
"""How often each kind is asked where it can be."""
MAKERS: dict[str, Callable[[Speaker], list[Offer]]] = {
    "presence": kinds.presence, "half": kinds.half, "side": kinds.side, "where": kinds.where,
    "count": kinds.count, "part count": kinds.part_count, "category": kinds.category,
    "finer": kinds.finer, "objects": kinds.objects, "shape": kinds.shape, "area": kinds.area,
    "extreme": relations.extreme, "relation": relations.relation, "beside": relations.beside,
    "larger": relations.larger, "side of": relations.side_of, "more": relations.more,
    "option": relations.option, "reasoning": relations.reasoning,
    "cover": lambda speaker: cover.cover_offers(speaker.picture, speaker.draw),
}  # fmt: skip
BALANCE = Balance()
"""What was asked so far in this process, unless a balance is given."""


class Asker:
    """Asks about one picture."""

    def __init__(self, picture: dict[str, Any], draw: random.Random, balance: Balance) -> None:
        self.speaker, self.draw, self.balance = Speaker(picture, draw), draw, balance
        self.asked = Balance()
        self.left: dict[str, list[Offer]] = {}

    def ask(self) -> PictureQuestion | None:
        """One question; none where what was drawn would be answered the same way too often."""
        open_kinds = [kind for kind in KINDS if self.left.get(kind, True)]
        if not open_kinds:
            return None
        kind = self.draw.choices(open_kinds, [KINDS[k] for k in open_kinds])[0]
        if kind not in self.left:
            self.left[kind] = MAKERS[kind](self.speaker)
        offers = self.left[kind]
        if not offers:
            return None
        weights = [self.weight(offer) for offer in offers]
        place = self.draw.choices(range(len(offers)), weights)[0]
        offer = offers.pop(place)
        if self.draw.random() >= weights[place] / offer.weight:
            return None
        for key in offer.keys:
            self.balance.add(key, offer.answer)
        self.asked.add((offer.kind,), offer.answer)
        said = words.say(offer.templates, self.draw, **offer.words)
        shown = (offer.evidence, offer.boxes)
        return PictureQuestion(said.text, offer.answer, offer.kind, *shown, said.focus)

    def weight(self, offer: Offer) -> float:
        """How welcome an offer is; at most its own weight where its answer is not too rare."""
        welcome = 1.0
        for key in offer.keys:
            welcome *= min(self.balance.weight(key, offer.answer, offer.answers), 2.0)
        if offer.answers == YES_NO:
            welcome *= self.asked.weight((offer.kind,), offer.answer, YES_NO)
        return float(offer.weight * max(welcome, 1e-3) ** offer.power)


def boxed_questions(
    picture: dict[str, Any], draw: random.Random, count: int, balance: Balance | None = None
) -> list[PictureQuestion]:
    """Questions on one picture; fewer where it does not offer more.

    Args:
        picture: As the module says.
        draw: Source of every choice.
        count: How many.
        balance: The answers given so far for other pictures; None for all of this process.
    """
    asker = Asker(picture, draw, BALANCE if balance is None else balance)
    found: list[PictureQuestion] = []
    for _ in range(count * 6):
        question = asker.ask()
        found += [question] if question else []
        if len(found) == count:
            break
    return found


def every_text() -> list[str]:
    """All wordings with all names, and all answers: what the vocabulary must spell."""
    answers = ["yes", "no", "above", "below", "larger", "smaller", "rural", "urban"]
    templates = words.templates_of(vars(words)) + words.templates_of(vars(cover))
    templates += [template for some in words.USES.values() for template in some]
    covers = [(name, name) for some in cover.COVER_NAMES.values() for name in some]
    return words.every_wording(templates, every_name() + covers, [*answers, *POSITIONS, *SOME])
