"""Questions about a picture's boxes, one kind of thing at a time: presence, place, number, kind."""

from __future__ import annotations

from collections import Counter

import boxed_wording as words
from boxed_offers import POSITIONS, SOME, Offer, Speaker, agreeing, naming, yes_no
from boxed_things import CLEAR, CONCEPTS, FINE, HARD

LONGEST_COUNT = 9


def presence(speaker: Speaker) -> list[Offer]:
    """Whether something is there, and whether something is that is not."""
    found = []
    for name, concept in CONCEPTS.items():
        weight = concept.weight
        if name in speaker.things.held:
            answer, evidence = "yes", speaker.things.held[name]
        elif speaker.things.absent(name):
            answer, evidence = "no", ()
            weight *= HARD if concept.place in speaker.things.places else 1.0
        else:
            continue
        found.append(yes_no("presence", words.PRESENCE, answer, speaker.words_for(name), evidence,
                             about=name, weight=weight))  # fmt: skip
    return found


def half(speaker: Speaker) -> list[Offer]:
    """Whether something is in one half; mostly about what is somewhere in the picture."""
    found = []
    for name, concept in CONCEPTS.items():
        held = speaker.things.held.get(name, ())
        if not held and not speaker.things.absent(name):
            continue
        for part, spoken in words.HALVES.items():
            inside = tuple(i for i in held if speaker.things.half(i, part))
            outside = all(speaker.things.outside(i, part) for i in held)
            if not inside and not (outside and (not held or speaker.things.complete(name))):
                continue
            weight = concept.weight * (1.0 if held else 0.1)
            fields = {**speaker.words_for(name), "half": speaker.draw.choice(spoken)}
            found.append(yes_no("half", words.HALF, "yes" if inside else "no", fields, inside,
                                 about=name, weight=weight))  # fmt: skip
    return found


def side(speaker: Speaker) -> list[Offer]:
    """In which half all of them are."""
    found = []
    for name, held in speaker.things.held.items():
        if not speaker.things.located(name):
            continue
        weight = CONCEPTS[name].weight
        for pair in words.SIDES:
            asked = [(held, speaker.those(name, len(held)), weight)]
            # Where the left-most one is needs no look at the picture.
            things = [t for t in speaker.named(name) if t.extreme and t.extreme not in pair]
            asked += [((t.index,), agreeing(t.phrase, False), 0.4 * weight) for t in things]
            for indices, fields, welcome in asked:
                inside = [s for s in pair if all(speaker.things.half(i, s) for i in indices)]
                if inside:
                    one, other = pair if speaker.draw.random() < 0.6 else pair[::-1]
                    keys = (("side", *pair), ("side", name, *pair))
                    spoken = {**fields, "one": one, "other": other}
                    found.append(Offer("side", words.SIDE, inside[0], spoken, indices, keys, pair,
                                       4.0, welcome))  # fmt: skip
    return found


def where(speaker: Speaker) -> list[Offer]:
    """In which ninth one thing or most of several are."""
    found = []
    keys = (("where",),)
    for name, held in speaker.things.held.items():
        weight = CONCEPTS[name].weight
        ninths = Counter(speaker.things.ninth(i) for i in held)
        place, number = ninths.most_common(1)[0]
        if speaker.things.located(name) and place is not None and len(held) in (1, number):
            fields = speaker.those(name, len(held))
            found.append(Offer("where", words.WHERE, place, fields, held, keys, POSITIONS, 1.5,
                               weight))  # fmt: skip
        elif speaker.things.located(name) and place is not None and number >= 0.6 * len(held):
            fields = speaker.words_for(name)
            found.append(Offer("where", words.MOST, place, fields, held, keys, POSITIONS, 1.5,
                               weight))  # fmt: skip
        for thing in speaker.named(name):
            place = speaker.things.ninth(thing.index)
            if thing.extreme and place is not None:
                found.append(Offer("where", words.WHERE, place, agreeing(thing.phrase, False),
                                   (thing.index,), keys, POSITIONS, 1.5, weight * 0.5))  # fmt: skip
    return found


def count(speaker: Speaker) -> list[Offer]:
    """How many there are."""
    found = []
    for name, held in speaker.things.held.items():
        if speaker.things.complete(name) and len(held) <= LONGEST_COUNT:
            found.append(counted(speaker, name, held, words.COUNT, {}))
    return found


def counted(
    speaker: Speaker,
    name: str,
    shown: tuple[int, ...],
    templates: tuple[str, ...],
    fields: dict[str, str],
) -> Offer:
    """A count; small ones are common, so the others are asked for more often."""
    keys = (("count",), ("count", name))
    return Offer("count", templates, str(len(shown)), {**speaker.words_for(name), **fields}, shown,
                 keys, SOME, 1.0, CONCEPTS[name].weight)  # fmt: skip


def part_count(speaker: Speaker) -> list[Offer]:
    """How many there are in a half or a ninth, where none lies on its border."""
    found = []
    for name, held in speaker.things.held.items():
        if not speaker.things.complete(name) or len(held) < 2:
            continue
        for which, spoken in words.HALVES.items():
            inside = tuple(i for i in held if speaker.things.half(i, which, CLEAR))
            outside = sum(speaker.things.half(i, words.OPPOSITE[which], CLEAR) for i in held)
            if 0 < len(inside) <= LONGEST_COUNT and len(inside) + outside == len(held):
                part = f"{speaker.draw.choice(spoken)} half"
                found.append(counted(speaker, name, inside, words.PART_COUNT, {"part": part}))
        ninths = [speaker.things.ninth(i) for i in held]
        for place in sorted({ninth for ninth in ninths if ninth} if None not in ninths else ()):
            inside = tuple(i for i, ninth in zip(held, ninths, strict=True) if ninth == place)
            if len(inside) <= LONGEST_COUNT:
                part = speaker.draw.choice(words.PARTS[place])
                found.append(counted(speaker, name, inside, words.PART_COUNT, {"part": part}))
    return found


def category(speaker: Speaker) -> list[Offer]:
    """What is in one ninth, where all boxes there are of one kind."""
    if not speaker.things.closed:
        return []
    found = []
    centres = [speaker.things.ninth(i) for i in range(len(speaker.things.labels))]
    for place in sorted({place for place in centres if place}):
        inside = tuple(i for i, ninth in enumerate(centres) if ninth == place)
        kinds = {speaker.things.answer(i) for i in inside}
        if len(kinds) == 1:
            part = speaker.draw.choice(words.PARTS[place])
            found.append(naming("category", words.CATEGORY, {"part": part}, kinds.pop(), inside))
    return found


def finer(speaker: Speaker) -> list[Offer]:
    """What kind of airplane or vehicle is in one ninth."""
    found = []
    for name, labels in FINE.items():
        held = speaker.things.held.get(name, ())
        ninths = {i: speaker.things.ninth(i) for i in held}
        for place in sorted({place for place in ninths.values() if place}):
            inside = tuple(i for i in held if ninths[i] == place)
            kinds = {speaker.things.labels[i] for i in inside}
            if len(kinds) != 1 or not kinds <= set(labels):
                continue
            label = kinds.pop()
            fields = {**speaker.words_for(name), "part": speaker.draw.choice(words.PARTS[place])}
            found.append(naming("category", words.FINER, fields,
                                     CONCEPTS[label].answer or label, inside))  # fmt: skip
    return found


def objects(speaker: Speaker) -> list[Offer]:
    """The kinds that there are, the most frequent first; up to three."""
    if not speaker.things.closed or not speaker.things.labels:
        return []
    kinds = Counter(speaker.things.answer(i) for i in range(len(speaker.things.labels)))
    if len(kinds) > 3:
        return []
    names = [CONCEPTS[n].words[0][1] if n in CONCEPTS else f"{n}s" for n, _ in kinds.most_common()]
    everything = tuple(range(len(speaker.things.labels)))
    return [naming("objects", words.OBJECTS, {}, ", ".join(names), everything)]


def shape(speaker: Speaker) -> list[Offer]:
    """The shape that such things have."""
    return [
        naming("shape", words.SHAPE, speaker.words_for(name), shape, speaker.things.held[name])
        for name, shape in words.SHAPES.items() if name in speaker.things.held
    ]  # fmt: skip


def area(speaker: Speaker) -> list[Offer]:
    """Rural or urban, where that is known."""
    setting = speaker.picture.get("area")
    return [naming("rural", words.AREA, {}, setting, ())] if setting else []
