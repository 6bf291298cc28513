"""Questions about how things in a picture lie and compare, and what the place is used for."""

from __future__ import annotations

from itertools import combinations

import boxed_wording as words
from boxed_offers import MUCH, Offer, Speaker, naming, overlap, yes_no
from boxed_things import CLEAR, CONCEPTS, HARD, Thing, way

FAR_ENOUGH = 2 * CLEAR
"""Between the centres of two things of which one lies to one side of the other."""
SPORTS = ("baseball diamond", "ground track field", "tennis court", "basketball court")


def extreme(speaker: Speaker) -> list[Offer]:
    """What the left-most or the largest thing of all is."""
    if not speaker.things.closed or len(speaker.things.labels) < 2:
        return []
    found = speaker.things.extremes(range(len(speaker.things.labels)))
    return [
        naming("category", words.EXTREME,
                    {"extreme": speaker.draw.choice(words.EXTREMES[kind])},
                    speaker.things.answer(index), (index,))
        for kind, index in found.items()
    ]  # fmt: skip


def told(first: Thing, second: Thing, true: str) -> bool:
    """Whether the words alone say how two things lie: the left-most ship is left of all others."""
    if first.concept != second.concept:
        return False
    return bool({first.extreme, second.extreme} & {true, words.OPPOSITE[true]})


def relation(speaker: Speaker) -> list[Offer]:
    """Whether one thing lies left of, right of, above or below another."""
    found = []
    for a, b in speaker.pairs():
        true = way(speaker.things.centres[a.index], speaker.things.centres[b.index])
        if true is None or told(a, b, true):
            continue
        answer = speaker.draw.choice(("yes", "no"))
        asked = speaker.draw.choice(words.WAYS[true if answer == "yes" else words.OPPOSITE[true]])
        fields = {"first": a.phrase, "second": b.phrase, "way": asked}
        found.append(yes_no("relation", words.RELATION, answer, fields, (a.index, b.index)))
    return found


def beside(speaker: Speaker) -> list[Offer]:
    """What lies to one side of a thing, or closest to it, where only one kind does."""
    if not speaker.things.closed:
        return []
    found = []
    centres = speaker.things.centres
    for thing in (t for name in speaker.things.held for t in speaker.named(name)):
        here = centres[thing.index]
        fields = {"that": thing.phrase}
        others = [i for i in range(len(centres)) if i != thing.index]
        by_way: dict[str, list[int]] = {}
        for i in others:
            x, y = centres[i][0] - here[0], centres[i][1] - here[1]
            wide = (
                ("left" if x < 0 else "right")
                if abs(x) >= abs(y)
                else ("top" if y < 0 else "bottom")
            )
            by_way.setdefault(wide, []).append(i)
        away = {i: max(abs(a - b) for a, b in zip(centres[i], here, strict=True)) for i in others}
        for direction, some in by_way.items():
            kinds = {speaker.things.answer(i) for i in some}
            nearest = min(some, key=lambda i: away[i])
            if len(kinds) == 1 and away[nearest] >= FAR_ENOUGH:
                asked = {**fields, "way": speaker.draw.choice(words.WAYS[direction][:1])}
                found.append(naming("beside", words.BESIDE, asked, kinds.pop(),
                                         (thing.index, nearest)))  # fmt: skip
        order = sorted(others, key=lambda i: away[i])
        if order and (kind := speaker.things.answer(order[0])):
            different = [i for i in order if speaker.things.answer(i) != kind]
            if not different or away[different[0]] > 1.5 * away[order[0]] + CLEAR:
                found.append(naming("beside", words.CLOSEST, fields, kind,
                                         (thing.index, order[0]), 0.5))  # fmt: skip
    return found


def larger(speaker: Speaker) -> list[Offer]:
    """Which of two kinds of things is larger, or further to one side."""
    found = []
    for a, b in speaker.pairs():
        if a.concept == b.concept or (a.extreme and b.extreme):
            continue
        first, second = speaker.things.areas[a.index], speaker.things.areas[b.index]
        options = []
        if max(first, second) > MUCH * min(first, second):
            options.append(("larger", a if first > second else b))
            options.append(("smaller", b if first > second else a))
        for direction, spoken in words.FURTHER.items():
            axis, sign = (
                direction in ("top", "bottom"),
                -1 if direction in ("left", "top") else 1,
            )
            apart = sign * (
                speaker.things.centres[a.index][axis] - speaker.things.centres[b.index][axis]
            )
            if abs(apart) > 2 * CLEAR:
                options.append((speaker.draw.choice(spoken), a if apart > 0 else b))
        for more, right in speaker.draw.sample(options, min(2, len(options))):
            fields = {"first": a.phrase, "second": b.phrase, "more": more}
            answer = speaker.things.answer(right.index) if right.extreme else right.phrase
            found.append(naming("which", words.LARGER, fields, answer, (a.index, b.index)))
    return found


def side_of(speaker: Speaker) -> list[Offer]:
    """On which side of one thing another lies."""
    found = []
    names = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
    for a, b in speaker.pairs():
        true = way(speaker.things.centres[b.index], speaker.things.centres[a.index])
        if true is not None and not told(a, b, true):
            fields = {"first": a.phrase, "second": b.phrase}
            found.append(Offer("side of", words.SIDE_OF, names[true], fields,
                               (a.index, b.index), (("side of",),), tuple(names.values()),
                               2.0))  # fmt: skip
    return found


def rivals(speaker: Speaker) -> list[tuple[str, str]]:
    """Pairs of concepts, one of them there at least, both surely counted."""
    sure = [n for n in CONCEPTS if speaker.things.absent(n)
            or (n in speaker.things.held and speaker.things.complete(n))]  # fmt: skip
    return [(a, b) for a, b in combinations(sure, 2)
            if {a, b} & speaker.things.held.keys() and not overlap(a, b)]  # fmt: skip


def more(speaker: Speaker) -> list[Offer]:
    """Of which of two kinds there are more."""
    found = []
    for pair in rivals(speaker):
        a, b = pair if speaker.draw.random() < 0.5 else pair[::-1]
        first, second = (speaker.things.held.get(n, ()) for n in (a, b))
        if len(first) == len(second):
            continue
        fields = {
            "first": speaker.things.name(a, speaker.draw)[1],
            "second": speaker.things.name(b, speaker.draw)[1],
        }
        weight = 1.0 if first and second else 0.15
        answer = "yes" if len(first) > len(second) else "no"
        found.append(yes_no("compare", words.MORE, answer, fields, first + second, weight=weight))
        if first and second:
            name = fields["first" if answer == "yes" else "second"]
            found.append(naming("which", words.MOST_OF, fields, name, first + second))
    return found


def option(speaker: Speaker) -> list[Offer]:
    """Which of two kinds is there, where the other is not."""
    found = []
    for pair in rivals(speaker):
        if sum(name in speaker.things.held for name in pair) != 1:
            continue
        a, b = pair if speaker.draw.random() < 0.5 else pair[::-1]
        there = a if a in speaker.things.held else b
        fields = {
            "first": speaker.things.name(a, speaker.draw)[1],
            "second": speaker.things.name(b, speaker.draw)[1],
        }
        answer = fields["first" if there == a else "second"]
        same = CONCEPTS[a].place == CONCEPTS[b].place
        found.append(Offer("option", words.OPTION, answer, fields, speaker.things.held[there],
                           (("option",),), (), 1.0, HARD if same else 1.0))  # fmt: skip
    return found


def reasoning(speaker: Speaker) -> list[Offer]:
    """What the place is used for."""
    held = speaker.things.held
    sports = tuple(i for name in SPORTS for i in held.get(name, ()))
    counts = {
        "air traffic": (held.get("airplane", ()), 3, ("airplane",), ()),
        "sports": (sports, 1, SPORTS, ()),
        "shipping": (
            held.get("harbor", ()) + held.get("ship", ()),
            2,
            ("harbor", "ship"),
            ("bridge",),
        ),
        "fuel storage": (held.get("storage tank", ()), 3, ("storage tank",), ()),
    }
    found, uses, unsure = [], [], False
    for use, (shown, least, needed, open_) in counts.items():
        absent = all(speaker.things.absent(n) for n in needed) and not held.keys() & set(open_)
        unsure |= len(shown) < least and not absent
        if len(shown) >= least or (absent and not shown):
            answer = "yes" if shown else "no"
            found.append(yes_no("reasoning", words.USES[use], answer, {}, shown, about=use))
            uses += [(use, shown)] if shown else []
    if len(uses) == 1 and not unsure:
        found.append(naming("reasoning", words.USE, {}, *uses[0]))
    return found
