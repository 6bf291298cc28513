"""Questions on a planned scene, with short answers and the boxes that show the answer.

Every answer follows from the plan alone. What a label's own picture may show besides is not asked
about (see `rules.py`); answers are balanced within each kind, so that no fixed answer pays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lrs_edge.errors import UsageError
from lrs_edge.objects.note import NINTHS
from lrs_edge.pyramid.box import PixelBox
from lrs_edge_export.scenes.plan import Placement, ScenePlan, gap
from lrs_edge_export.scenes.rules import DEFAULT_RULES, SceneRules
from lrs_edge_export.scenes.wording import (
    BESIDE,
    CATEGORY,
    CLOSEST,
    COUNT,
    POSITION,
    PRESENCE,
    PRESENCE_PLURAL,
    RURAL_URBAN,
    fill,
    plural,
    vary,
)

#: All kinds, and how often each is asked where it can be. `count`, `category` and `rural/urban
#: classification` are kinds of LRS-VQA, as its paper names them; the others are named here.
KINDS = {
    "presence": 0.24,
    "count": 0.2,
    "category": 0.16,
    "position": 0.18,
    "rural/urban classification": 0.06,
    "beside": 0.16,
}
#: Most of one scene's places with one label that are counted.
MAX_COUNT = 5
#: How often a count of each size is asked beside the others that the scene offers. Most labels
#: occur once or not at all: they are asked about less, and once in a scene at most, so that 0 and 1
#: are no better guesses.
_COUNT_WEIGHTS = {0: 0.15, 1: 0.2}
#: How often presence is asked in the singular.
_SINGULAR = 0.75
#: Free share of the width or height around the lines between ninths: nothing there is asked for.
_UNCLEAR = 0.03
#: A neighbour is beside a place when the gap is at most this share of the place's side.
_AT_HAND = 0.35
#: The nearest place is clear when the next one is this many times and pixels further away.
_CLEARLY, _CLEARLY_PIXELS = 1.6, 100
#: A place belongs to a ninth that holds this share of its area; it disturbs one from the other on.
_WITHIN, _DISTURBS = 0.6, 0.1


@dataclass(frozen=True)
class SceneQuestion:
    """One question on a scene.

    Attributes:
        text: What is asked.
        answer: Short, in lower case; numbers as digits.
        category: One of `KINDS`.
        boxes: Evidence, (x0, y0, x1, y1) in scene pixels; none for what is absent and for the
            setting, which the whole scene shows.
        focus: The words of `text` that name what to look for; "" for the setting.
    """

    text: str
    answer: str
    category: str
    boxes: tuple[PixelBox, ...]
    focus: str


@dataclass(frozen=True)
class _Candidate:
    """A question that could be asked: what about, and the answer; not yet worded."""

    templates: tuple[str, ...]
    about: str
    answer: str
    boxes: tuple[PixelBox, ...]


def scene_questions(
    plan: ScenePlan,
    draw: random.Random,
    count: int,
    kinds: Collection[str] | None = None,
    rules: SceneRules = DEFAULT_RULES,
) -> list[SceneQuestion]:
    """Ask about a scene.

    Args:
        plan: The scene.
        draw: Source of every choice.
        count: How many questions; fewer come back where the scene does not offer more.
        kinds: Which of `KINDS`; None for all.
        rules: Which labels are never counted.

    Returns:
        Questions, no two of which ask the same thing.

    Raises:
        UsageError: A kind is not known.
    """
    wanted = list(KINDS) if kinds is None else sorted(set(kinds))
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UsageError(
            f"{', '.join(unknown)}: not a kind of question; choose from {', '.join(KINDS)}"
        )
    asker = _Asker(plan, draw, rules)
    offers = {kind: asker.offers(kind) for kind in wanted}
    found: list[SceneQuestion] = []
    while len(found) < count:
        open_kinds = [kind for kind in wanted if any(offers[kind].values())]
        if not open_kinds:
            break
        weights = [KINDS[kind] * asker.eagerness(kind, offers[kind]) for kind in open_kinds]
        kind = draw.choices(open_kinds, weights)[0]
        groups = {answer: held for answer, held in offers[kind].items() if held}
        odds = [_COUNT_WEIGHTS.get(answer, 1.0) for answer in groups]
        group = groups[draw.choices(list(groups), odds)[0]]
        candidate = group.pop(draw.randrange(len(group)))
        found.append(asker.word(kind, candidate))
    return found


def every_text(labels: Sequence[str]) -> list[str]:
    """All wordings filled with every name, and all answers: what a vocabulary must spell.

    Args:
        labels: Spoken names.
    """
    places = [place for row in NINTHS for place in row]
    texts = [*RURAL_URBAN, *places, *(str(n) for n in range(MAX_COUNT + 1))]
    texts += ["yes", "no", "rural", "urban", *labels]
    for label in labels:
        texts += [fill(template, label) for template in PRESENCE]
        texts += [fill(template, plural(label)) for template in (*COUNT, *PRESENCE_PLURAL)]
        texts += [fill(template, label) for template in (*POSITION, *BESIDE, *CLOSEST)]
        texts += [label.capitalize(), label.upper(), plural(label).upper()]
    texts += [fill(template, place) for template in CATEGORY for place in places]
    cased = [changed for text in texts for changed in (text, text[:1].upper() + text[1:])]
    return list(dict.fromkeys([*cased, *(text.lower() for text in texts)]))


def ninth(plan: ScenePlan, point: tuple[float, float]) -> str | None:
    """The name of the ninth of the scene that a point lies in; None near a line between two.

    Args:
        plan: The scene.
        point: (x, y) in scene pixels.
    """
    x, y = point[0] / plan.width, point[1] / plan.height
    for line in (1 / 3, 2 / 3):
        if min(abs(x - line), abs(y - line)) < _UNCLEAR:
            return None
    return NINTHS[min(int(y * 3), 2)][min(int(x * 3), 2)]


class _Asker:
    """What can be asked about one scene.

    Offers of a kind are grouped by a key; a group is chosen first, then one of its questions. So
    "yes" is as frequent as "no", and every count is offered as often as the scenes allow.
    """

    def __init__(self, plan: ScenePlan, draw: random.Random, rules: SceneRules) -> None:
        self._plan, self._draw, self._rules = plan, draw, rules
        self._by_label: dict[str, list[Placement]] = {}
        for placement in plan.placements:
            self._by_label.setdefault(placement.label, []).append(placement)

    def offers(self, kind: str) -> dict[int, list[_Candidate]]:
        """Everything that can be asked of one kind, in groups."""
        make: dict[str, Callable[[], dict[int, list[_Candidate]]]] = {
            "presence": self._presence,
            "count": self._count,
            "category": self._category,
            "position": self._position,
            "rural/urban classification": self._setting,
            "beside": self._beside,
        }
        return make[kind]()

    def eagerness(self, kind: str, offers: dict[int, list[_Candidate]]) -> float:
        """Factor of a kind's weight: counting is rare where nothing occurs more than once."""
        if kind == "count" and not any(held for number, held in offers.items() if number > 1):
            return 0.1
        return 1.0

    def word(self, kind: str, candidate: _Candidate) -> SceneQuestion:
        """A candidate in words."""
        template = self._draw.choice(candidate.templates)
        text = fill(template, candidate.about)
        text, focus = vary(text, candidate.about, self._draw)
        return SceneQuestion(text, candidate.answer, kind, candidate.boxes, focus)

    def _presence(self) -> dict[int, list[_Candidate]]:
        yes = [self._whether(label, "yes", _boxes(held)) for label, held in self._by_label.items()]
        no = [self._whether(label, "no", ()) for label in self._plan.absent]
        return {101: yes, 100: no}

    def _whether(self, label: str, answer: str, boxes: tuple[PixelBox, ...]) -> _Candidate:
        """Presence, in the plural now and then where the label has one."""
        if label in self._rules.uncounted or self._draw.random() < _SINGULAR:
            return _Candidate(PRESENCE, label, answer, boxes)
        return _Candidate(PRESENCE_PLURAL, plural(label), answer, boxes)

    def _count(self) -> dict[int, list[_Candidate]]:
        groups: dict[int, list[_Candidate]] = {}
        for label in (*self._by_label, *self._plan.absent):
            held = self._by_label.get(label, [])
            if label in self._rules.uncounted or len(held) > MAX_COUNT:
                continue
            candidate = _Candidate(COUNT, plural(label), str(len(held)), _boxes(held))
            groups.setdefault(len(held), []).append(candidate)
        for number in _COUNT_WEIGHTS.keys() & groups.keys():
            groups[number] = [self._draw.choice(groups[number])]
        return groups

    def _category(self) -> dict[int, list[_Candidate]]:
        found: dict[int, list[_Candidate]] = {}
        for row, names in enumerate(NINTHS):
            for column, name in enumerate(names):
                only = self._only_in(row, column)
                if only is not None:
                    candidate = _Candidate(CATEGORY, name, only.label, (only.box,))
                    found.setdefault(200 + row * 3 + column, []).append(candidate)
        return found

    def _only_in(self, row: int, column: int) -> Placement | None:
        """The one place in a ninth, where there is exactly one and no other reaches far into it."""
        width, height = self._plan.width / 3, self._plan.height / 3
        area = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        shares = [(_share(p.box, area), p) for p in self._plan.placements]
        reaching = [(share, p) for share, p in shares if share > _DISTURBS]
        if len(reaching) == 1 and reaching[0][0] >= _WITHIN:
            return reaching[0][1]
        return None

    def _position(self) -> dict[int, list[_Candidate]]:
        found: dict[int, list[_Candidate]] = {}
        for label, held in self._by_label.items():
            where = ninth(self._plan, held[0].center)
            if len(held) == 1 and where is not None:
                # Grouped by position, so that one scene asks for different parts of it.
                group = 300 + [name for row in NINTHS for name in row].index(where)
                candidate = _Candidate(POSITION, label, where, _boxes(held))
                found.setdefault(group, []).append(candidate)
        return found

    def _setting(self) -> dict[int, list[_Candidate]]:
        return {400: [_Candidate(RURAL_URBAN, "", self._plan.setting, ())]}

    def _beside(self) -> dict[int, list[_Candidate]]:
        at_hand: list[_Candidate] = []
        apart: list[_Candidate] = []
        for label, held in self._by_label.items():
            if len(held) > 1:
                continue
            here = held[0]
            others = sorted(
                ((gap(here.box, p.box), i, p) for i, p in enumerate(self._plan.placements)),
            )
            others = [other for other in others if other[2] is not here]
            if not others:
                continue
            distance, _, nearest = others[0]
            clear = distance * _CLEARLY + _CLEARLY_PIXELS
            # Farther ones with the nearest one's label would be the same answer.
            if any(d < clear for d, _, p in others[1:] if p.label != nearest.label):
                continue
            boxes = (here.box, nearest.box)
            x0, y0, x1, y1 = here.box
            if distance <= _AT_HAND * min(x1 - x0, y1 - y0):
                at_hand.append(_Candidate(BESIDE + CLOSEST, label, nearest.label, boxes))
            else:
                apart.append(_Candidate(CLOSEST, label, nearest.label, boxes))
        return {501: at_hand, 500: apart}


def _boxes(placements: Sequence[Placement]) -> tuple[PixelBox, ...]:
    return tuple(placement.box for placement in placements)


def _share(box: PixelBox, area: tuple[float, float, float, float]) -> float:
    """How much of a box lies in an area."""
    across = max(0.0, min(box[2], area[2]) - max(box[0], area[0]))
    down = max(0.0, min(box[3], area[3]) - max(box[1], area[1]))
    return across * down / ((box[2] - box[0]) * (box[3] - box[1]))
