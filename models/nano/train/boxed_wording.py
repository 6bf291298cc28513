"""How questions about boxed pictures are worded: names of things, and templates of every kind.

In a template, square brackets hold the words that say what to look for; `say` takes them out and
returns what stood between them. `{name}` and `{names}` are one thing and several, `{a}` is the
article before `{name}`; `{half}`, `{part}` and `{way}` are parts of the picture and directions.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SUFFIX = "Answer the question using a single word or phrase."
"""LRS-VQA's own, after every question."""
SUFFIXES = (
    "Answer in one word.", "Answer briefly.", "Answer with a single word.",
    "Keep the answer short.",
)  # fmt: skip
HALVES = {
    "left": ("left",), "right": ("right",),
    "top": ("top", "top", "upper"), "bottom": ("bottom", "bottom", "lower"),
}  # fmt: skip
PARTS = {
    "top left": ("top left", "top left corner", "upper left", "top-left part"),
    "top": ("top middle", "top center", "middle of the top edge"),
    "top right": ("top right", "top right corner", "upper right", "top-right part"),
    "left": ("middle left", "center left", "middle of the left edge"),
    "center": ("center", "middle", "very center", "central part"),
    "right": ("middle right", "center right", "middle of the right edge"),
    "bottom left": ("bottom left", "bottom left corner", "lower left", "bottom-left part"),
    "bottom": ("bottom middle", "bottom center", "middle of the bottom edge"),
    "bottom right": ("bottom right", "bottom right corner", "lower right", "bottom-right part"),
}
"""How a question names the ninth that an answer calls by the key."""
EXTREMES = {
    "left": ("left-most", "left-most", "leftmost"),
    "right": ("right-most", "right-most", "rightmost"),
    "top": ("top-most", "top-most", "topmost", "uppermost"),
    "bottom": ("bottom-most", "bottom-most", "lowest"),
    "largest": ("largest", "largest", "biggest"), "smallest": ("smallest",),
}  # fmt: skip
WAYS = {
    "left": ("to the left of", "left of"), "right": ("to the right of", "right of"),
    "top": ("above", "higher up than"), "bottom": ("below", "lower down than"),
}  # fmt: skip
FURTHER = {
    "left": ("further left", "more to the left"), "right": ("further right", "more to the right"),
    "top": ("further up", "closer to the top"), "bottom": ("further down", "closer to the bottom"),
}  # fmt: skip
SIDES = (("left", "right"), ("top", "bottom"))
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

PRESENCE = (
    "Is there {a} [{name}] in this image?", "Is there {a} [{name}]?",
    "Is there any [{name}] here?", "Is {a} [{name}] visible in the picture?",
    "Does the image show {a} [{name}]?", "Can you see {a} [{name}]?",
    "Do you see {a} [{name}] in this satellite image?", "Does this scene contain {a} [{name}]?",
    "is there {a} [{name}]", "[{name}]?", "Is at least one [{name}] present in the image?",
    "Can {a} [{name}] be found in this image?", "Are there any [{names}]?",
    "Are there any [{names}] in this image?", "any [{names}] here",
    "Are there [{names}] in the scene?", "Can you see any [{names}]?", "Do you see [{names}]?",
    "Does the image show any [{names}]?", "Are any [{names}] visible?", "[{names}]?",
    "Does the picture contain [{names}]?", "Please check whether there are any [{names}].",
    "Tell me if there are [{names}] in the image.", "Are [{names}] present in this aerial image?",
)  # fmt: skip
HALF = (
    "Is there {a} [{name}] in the {half} half of the image?",
    "Is there {a} [{name}] in the {half} half?",
    "Does the {half} half of the image show {a} [{name}]?",
    "is there {a} [{name}] in the {half} half",
    "Can you see {a} [{name}] in the {half} half of the picture?",
    "any [{names}] in the {half} half", "Are there any [{names}] in the {half} half of the image?",
    "Are there [{names}] in the {half} half?",
    "Are any [{names}] visible in the {half} half of the scene?", "[{names}] in the {half} half?",
    "Does the {half} half contain any [{names}]?", "In the {half} half, are there any [{names}]?",
)  # fmt: skip
SIDE = (
    "{Is} the [{that}] in the {one} or the {other} half of the image?",
    "{Is} the [{that}] in the {one} or {other} half?",
    "{Is} the [{that}] in the {one} half or the {other} half of the picture?",
    "In which half of the image {is} the [{that}], {one} or {other}?",
    "Which half of the image shows the [{that}], the {one} or the {other}?",
    "{Is} the [{that}] on the {one} or on the {other}?",
    "{one} or {other} half: where {is} the [{that}]?",
    "Which half {is} the [{that}] in: {one} or {other}?", "{is} the [{that}] {one} or {other}",
    "Tell me whether the [{that}] {is} in the {one} or the {other} half of the scene.",
    "Where {is} the [{that}], in the {one} or in the {other} half?",
    "{one} or {other}: which half has the [{that}]?",
)  # fmt: skip
WHERE = (
    "Where {is} the [{that}]?", "Where {is} the [{that}] in the image?", "where {is} the [{that}]",
    "Where in the image {is} the [{that}]?", "Where can I find the [{that}]?",
    "Find the [{that}].", "In which part of the image {is} the [{that}]?", "Locate the [{that}].",
    "[{that}], where?", "Which part of the image shows the [{that}]?",
    "What is the position of the [{that}]?",
    "In what part of the scene {is} the [{that}] located?",
    "Please tell me where the [{that}] {is}.",
    "What is the location of the [{that}] in the image?",
)  # fmt: skip
MOST = (
    "Where are most [{names}]?", "Where are most of the [{names}]?", "where are most [{names}]",
    "In which part of the image are most [{names}]?",
    "Which part of the image has the most [{names}]?", "Where do most [{names}] lie?",
    "Where in the picture are the most [{names}]?",
    "In what part of the scene are most of the [{names}]?",
    "Which part shows most of the [{names}]?",
)  # fmt: skip
COUNT = (
    "How many [{names}] are there?", "How many [{names}] are there in this image?",
    "How many [{names}] can you see?", "How many [{names}] are visible in the picture?",
    "Count the [{names}].", "Count the [{names}] in the image.", "how many [{names}]",
    "What is the number of [{names}] in the image?", "number of [{names}]?",
    "Please count the [{names}] in the scene.", "How many [{names}] does the image show?",
    "What is the total number of [{names}]?", "How many [{names}] can be seen?",
)  # fmt: skip
PART_COUNT = (
    "How many [{names}] are in the {part} of the image?", "How many [{names}] are in the {part}?",
    "Count the [{names}] in the {part} of the picture.", "how many [{names}] in the {part}",
    "What is the number of [{names}] in the {part}?",
    "How many [{names}] can you see in the {part}?",
    "In the {part}, how many [{names}] are there?", "How many [{names}] does the {part} show?",
    "How many [{names}] lie in the {part} of the scene?",
)  # fmt: skip
EXTREME = (
    "What is the [{extreme} object]?", "What is the [{extreme} object] in the image?",
    "What is the category of the [{extreme} object]?",
    "Which kind of object is the [{extreme} one]?",
    "What type of object is the [{extreme} object]?", "what is the [{extreme} object]",
    "What kind of thing is the [{extreme} object] in this picture?",
    "Name the [{extreme} object].", "What class does the [{extreme} object] belong to?",
    "Identify the [{extreme} object].",
)  # fmt: skip
CATEGORY = (
    "What is in the [{part}] of the image?", "What object is in the [{part}] of the image?",
    "What kind of object is at the [{part}]?", "What is at the [{part}]?",
    "what is at the [{part}]", "What is the category of the object in the [{part}] of the image?",
    "what is in the [{part}]", "What can be seen in the [{part}] of the picture?",
    "Which object lies in the [{part}]?", "Name the object in the [{part}] of the scene.",
)  # fmt: skip
FINER = (
    "What kind of [{name}] is in the {part} of the image?",
    "What kind of [{name}] is at the {part}?", "What type of [{name}] is in the {part}?",
    "Which type of [{name}] is at the {part}?", "what kind of [{name}] is at the {part}",
    "What sort of [{name}] can be seen in the {part}?",
    "What is the type of the [{name}] in the {part}?", "Name the kind of [{name}] in the {part}.",
    "What is the category of the [{name}] at the {part}?",
)  # fmt: skip
RELATION = (
    "Is the [{first} {way} the {second}]?", "Is the [{first} {way} the {second}] in the image?",
    "Does the {first} lie {way} the [{second}]?", "is the [{first} {way} the {second}]",
    "Would you say the {first} is {way} the [{second}]?",
    "Is the {first} located {way} the [{second}]?",
    "Tell me whether the {first} is {way} the [{second}].",
    "In this picture, is the [{first} {way} the {second}]?",
    "Can the {first} be found {way} the [{second}]?",
)  # fmt: skip
BESIDE = (
    "What is {way} the [{that}]?", "What object is {way} the [{that}]?",
    "what is {way} the [{that}]", "What can be seen {way} the [{that}]?",
    "What kind of object is {way} the [{that}]?", "What lies {way} the [{that}]?",
    "Which object is located {way} the [{that}]?",
    "What is the category of the object {way} the [{that}]?", "Name what is {way} the [{that}].",
)  # fmt: skip
CLOSEST = (
    "What is closest to the [{that}]?", "What is nearest to the [{that}]?",
    "what is next to the [{that}]", "What object is closest to the [{that}]?",
    "What is next to the [{that}]?", "Which object is nearest to the [{that}]?",
    "What kind of object lies closest to the [{that}]?",
    "What is the nearest object to the [{that}]?", "Name the object beside the [{that}].",
)  # fmt: skip
LARGER = (
    "Which is {more}, the [{first} or the {second}]?",
    "Which one is {more}: the [{first} or the {second}]?",
    "What is {more}, the [{first} or the {second}]?",
    "which is {more}, the [{first} or the {second}]",
    "Of the [{first} and the {second}], which is {more}?",
    "Is the [{first} or the {second}] {more}?",
    "Which of the two is {more}, the [{first} or the {second}]?",
    "{more}: the [{first} or the {second}]?",
    "Tell me which is {more}, the [{first} or the {second}].",
)  # fmt: skip
SIDE_OF = (
    "On which side of the {first} is the [{second}]?",
    "Where is the [{second}] relative to the {first}?",
    "On what side of the {first} does the [{second}] lie?",
    "Which side of the {first} is the [{second}] on?",
    "In which direction from the {first} is the [{second}]?",
    "From the {first}, where is the [{second}]?",
    "Seen from the {first}, on which side is the [{second}]?",
    "which side of the {first} is the [{second}]",
)  # fmt: skip
MORE = (
    "Are there more [{first} than {second}]?",
    "Are there more [{first} than {second}] in this image?",
    "Does the image show more [{first} than {second}]?", "more [{first} than {second}]?",
    "Can you see more [{first} than {second}]?", "are there more [{first} than {second}]",
    "Do you count more [{first} than {second}] here?",
    "Is it true that there are more [{first} than {second}]?",
    "Are more [{first} than {second}] visible?",
)  # fmt: skip
MOST_OF = (
    "Are there more [{first} or {second}]?", "Which are there more of, [{first} or {second}]?",
    "What is more frequent, [{first} or {second}]?", "more [{first} or {second}]?",
    "Of which are there more, [{first} or {second}]?", "are there more [{first} or {second}]",
    "Does the image show more [{first} or {second}]?",
    "Which do you see more of: [{first} or {second}]?",
)  # fmt: skip
OPTION = (
    "Are there [{first} or {second}] in this image?", "Are there [{first} or {second}]?",
    "Which can be seen, [{first} or {second}]?",
    "What does the image show, [{first} or {second}]?", "[{first} or {second}]?",
    "Does the picture show [{first} or {second}]?", "which is it, [{first} or {second}]",
    "Which of these is in the image: [{first} or {second}]?",
    "Do you see [{first} or {second}] here?",
)  # fmt: skip
OBJECTS = (
    "What [objects] are visible?", "What [objects] can be seen in the image?",
    "Which [objects] are there?", "List the [objects] in the image.", "what [objects] are there",
    "What kinds of [objects] are in this picture?", "Name the [objects] that you see.",
    "Which [objects] does the image show?", "What are the [objects] in the scene?",
)  # fmt: skip
SHAPE = (
    "What is the shape of the [{name}]?", "What shape is the [{name}]?",
    "what shape is the [{name}]", "What shape does the [{name}] have?",
    "Which shape best describes the [{name}]?", "What is the shape of the [{names}]?",
    "What shape are the [{names}]?", "What shape do the [{names}] have?",
)  # fmt: skip
SHAPES = {
    "storage tank": "round", "tennis court": "rectangular", "basketball court": "rectangular",
    "ground track field": "oval", "roundabout": "round",
}  # fmt: skip
USES = {
    "air traffic": (
        "Is this place used for [air traffic]?", "Could this be part of an [airport]?",
        "Is this an area for [air traffic]?", "Is this a place where [planes] park or take off?",
        "Would you expect to board a [plane] here?", "Does [air traffic] use this place?",
        "is this place used for [flying]", "Is this likely an [airport or airfield]?",
    ),
    "sports": (
        "Is this place used for [sports]?", "Can people do [sports] here?",
        "Is this a place for [sports]?", "Are there facilities for [sports]?",
        "is this place used for [sports]", "Could [sports] matches be held here?",
        "Does this area serve [sports]?", "Would athletes come here for [sports]?",
    ),
    "shipping": (
        "Is this place used for [shipping]?", "Is this a place for [ships]?",
        "Can [ships] dock or sail here?", "Is there [water traffic] here?",
        "is this place used for [shipping]", "Does this area serve [shipping]?",
        "Could goods arrive here by [ship]?", "Would you expect sailors or [boats] here?",
    ),
    "fuel storage": (
        "Is this place used for [fuel storage]?", "Is [fuel or oil] stored here?",
        "Is this a place for [oil storage]?", "Could this be an [oil depot]?",
        "is this place used for [fuel storage]", "Does this area serve [fuel storage]?",
        "Is this likely a [tank farm]?", "Would [oil] be kept here?",
    ),
}  # fmt: skip
USE = (
    "What is this place used for?", "What is the use of this place?", "What does this area serve?",
    "What is the likely purpose of this place?", "what is this place used for",
    "What goes on here?", "For what is this area used?", "What purpose does this area have?",
)  # fmt: skip
AREA = (
    "Is this a rural or an urban area?", "Is the area rural or urban?", "Rural or urban?",
    "Urban or rural?", "Does the image show a rural or an urban area?",
    "Is the scene urban or rural?", "rural or urban area",
    "Would you call this area urban or rural?", "Is it mostly rural or urban here?",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A question's text, and the words of it that say what to look for ("" for the whole scene)."""

    text: str
    focus: str


def article(name: str) -> str:
    """'a' or 'an', as it stands before the name."""
    return "an" if name[0].lower() in "aeiou" else "a"


def bare(template: str, **words: str) -> Said:
    """A template with its words, as written."""
    filled = template.format(**words)
    focus = re.search(r"\[(.*?)\]", filled)
    return Said(re.sub(r"[\[\]]", "", filled), focus[1] if focus else "")


def say(templates: tuple[str, ...], draw: random.Random, **words: str) -> Said:
    """One of the templates in words; now and then other case, punctuation, or what LRS-VQA adds."""
    said = bare(draw.choice(templates), **words)
    text, focus = said.text, said.focus
    roll = draw.random()
    if roll < 0.08:
        text, focus = text.rstrip("?.").lower(), focus.lower()
    elif roll < 0.10:
        text, focus = text.upper(), focus.upper()
    elif roll < 0.15:
        text = text.rstrip("?.")
    elif roll < 0.17:
        text = text.rstrip("?.") + draw.choice(("??", " ?", "!", "?!"))
    elif text[0].islower() and not text.startswith(focus or "\0") and draw.random() < 0.5:
        text = text[0].upper() + text[1:]
    roll = draw.random()
    if roll < 0.16:
        text += draw.choice((" ", " ", "\n")) + SUFFIX
    elif roll < 0.20:
        text += f" {draw.choice(SUFFIXES)}"
    return Said(text, focus)


def every_wording(
    templates: list[str], names: list[tuple[str, str]], answers: list[str]
) -> list[str]:
    """Every template filled with every name, and the answers: what a vocabulary must spell.

    Args:
        templates: Of all kinds.
        names: One thing and several, for all words that things are called by.
        answers: All answers that are no names.
    """
    texts = [SUFFIX, *SUFFIXES, *answers, *SHAPES.values(), *USES]
    for group in (HALVES, PARTS, EXTREMES, WAYS, FURTHER):
        texts += [word for spoken in group.values() for word in spoken]
    words = {"half": "left", "part": "top left", "way": "above", "one": "left", "other": "right"}
    words |= {"extreme": "largest", "more": "larger", "is": "is", "Is": "Is"}
    for name, several in names:
        words |= {"name": name, "names": several, "a": article(name), "that": name, "cover": name}
        words |= {"first": several, "second": name}
        texts += [bare(template, **words).text for template in templates]
        texts += [name, name.capitalize(), several, several.capitalize()]
    return list(dict.fromkeys(texts))


def templates_of(module: dict[str, object]) -> list[str]:
    """All templates that a module holds.

    Args:
        module: What its names stand for.
    """
    held = [
        v for k, v in module.items() if k.isupper() and isinstance(v, tuple) and k != "SUFFIXES"
    ]
    return [text for some in held for text in some if isinstance(text, str) and " " in text]
