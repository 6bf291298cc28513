"""Training questions and answers, in varied wording, for scenes, mosaics and photographs.

Everything here is text: a `Question` has its wording, its answer and, where known, which regions
hold the evidence. Wording templates come first so that the vocabulary can be built from them.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common import SCENE_QUESTION, SCENES

SCENE = [
    SCENE_QUESTION, SCENE_QUESTION, SCENE_QUESTION,
    "What kind of place is shown in this image?", "What type of scene is this?",
    "What is shown in the image?", "Which scene category does this image belong to?",
    "What place is this?", "Name the scene.", "Classify this image.", "What is this?",
    "What scene does this aerial image show?", "What kind of area is this?",
    "Identify the type of place in this satellite image.", "what do you see here",
    "scene?", "WHAT KIND OF PLACE IS THIS", "what kind of place is this", "Type of place?",
    "What type of land use is this?", "What kind of place is this? Answer briefly.",
    "Which type of scene is in the picture?", "What is the main thing in this image?",
]  # fmt: skip
PRESENCE = [
    "Is there {a} in this image?", "Is there {a} here?", "Is this {a}?", "Does the image show {a}?",
    "Can you see {a}?", "{name}?", "Is {a} visible in the picture?", "is there {a}",
    "Does this look like {a}?", "Do you see {a} in this satellite image?", "Is there {a}?",
    "IS THERE {upper}?", "Is there any {name} in the scene?",
]  # fmt: skip
CAPTION = [
    "Describe the image.", "Describe this image.", "What can be seen in this image?",
    "Write a caption for this image.", "Give a short description of the picture.",
    "describe the scene", "Caption this aerial photograph.", "What is in this picture?",
    "Please describe what you see.", "Describe the satellite image in one sentence.",
]  # fmt: skip
PLACE_AT = [
    "What is at the {where}?", "What is in the {where} of the image?", "What is on the {where}?",
    "What kind of place is at the {where}?", "{where}?", "What can be seen at the {where}?",
    "Which scene is in the {where} part?",
]  # fmt: skip
WHERE = [
    "Where is the {name}?", "In which part of the image is the {name}?", "where is the {name}",
    "Locate the {name}.", "Where can the {name} be found?", "Where is the {name} in the image?",
    "Find the {name}.",
]  # fmt: skip
LISTING = [
    "Which places are visible?", "What places can be seen in this image?", "List the places.",
    "What does this image contain?", "Name the scenes in the image.", "Which scenes are visible?",
]  # fmt: skip
RURAL = ["Is this a rural or an urban area?", "Rural or urban?", "Is the area rural or urban?"]
OBJECTS = [
    "What objects are visible?", "Which vehicles can be seen?", "What objects can be seen?",
    "List the objects in the image.", "What kinds of vehicles are in this image?",
]  # fmt: skip
MOST = ["Where are most {names}?", "Where are the {names}?", "In which part are most {names}?"]
COUNT = ["How many {names} are there?", "How many {names} can you see?", "Count the {names}."]
CHOICE = [
    "What kind of place is this? {options} Answer with the letter.",
    "Which is shown? {options} Answer with the letter.",
    "What is in the image? {options} Answer with the option's letter.",
    "{options} Answer with the letter of the right choice.",
]  # fmt: skip
PLAIN = {"storage tanks", "farmland", "bare land"}
URBAN = {
    "Airport", "Center", "Church", "Commercial", "DenseResidential", "Industrial", "Parking",
    "MediumResidential", "RailwayStation", "School", "Square", "Stadium", "Playground", "Viaduct",
}  # fmt: skip
RURAL_SCENES = {
    "BareLand",
    "Desert",
    "Farmland",
    "Forest",
    "Meadow",
    "Mountain",
    "SparseResidential",
}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OBJECT_NAMES: dict[str, tuple[str, str]] = {
    "car": ("car", "cars"),
    "van": ("van", "vans"),
    "truck": ("truck", "trucks"),
    "bus": ("bus", "buses"),
    "boat": ("boat", "boats"),
    "airliner": ("airliner", "airliners"),
    "chartered": ("chartered plane", "chartered planes"),
    "trainer": ("trainer plane", "trainer planes"),
    "propeller": ("propeller plane", "propeller planes"),
    "longvehicle": ("long vehicle", "long vehicles"),
    "stairtruck": ("stair truck", "stair trucks"),
    "pushbacktruck": ("pushback truck", "pushback trucks"),
    "helicopter": ("helicopter", "helicopters"),
    "fighter": ("fighter plane", "fighter planes"),
    "building": ("building", "buildings"),
    "tree": ("tree", "trees"),
    "minibus": ("minibus", "minibuses"),
}
PLANES = {"airliner", "chartered", "trainer", "propeller", "fighter"}
"""SIMD classes that a person would call a plane."""


@dataclass(frozen=True)
class Question:
    """One question with its answer; evidence holds the indices of the regions that show it."""

    text: str
    answer: str
    kind: str
    evidence: tuple[int, ...] = field(default=())
    focus: str = ""
    """The words of the question that say what to look for."""


def with_article(name: str) -> str:
    """'an airport', 'storage tanks'."""
    if name in PLAIN or name.endswith("s"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def fill(template: str, draw: random.Random, **words: str) -> str:
    """Fill one template and, now and then, change case or punctuation."""
    text = template.format(**words)
    roll = draw.random()
    if roll < 0.04:
        text = text.lower()
    elif roll < 0.06:
        text = text.upper()
    elif roll < 0.10:
        text = text.rstrip("?.")
    elif roll < 0.12:
        text = text.rstrip("?.") + draw.choice(["??", " ?", "...", "!", "?!"])
    return text


def presence(name: str, draw: random.Random) -> str:
    """A yes/no wording."""
    names = {"name": name, "upper": with_article(name).upper(), "a": with_article(name)}
    return fill(draw.choice(PRESENCE), draw, **names)


def options(right: str, draw: random.Random) -> tuple[str, str]:
    """Four lettered choices and the right letter."""
    names = draw.sample([n for n in SCENES.values() if n != right], 3)
    at = draw.randrange(4)
    names.insert(at, right)
    return " ".join(f"({'ABCD'[i]}) {n}" for i, n in enumerate(names)), "ABCD"[at]


CONFUSED = [
    {"DenseResidential", "MediumResidential", "SparseResidential", "Commercial", "Industrial"},
    {"Center", "Square", "Church", "Stadium", "Park", "School", "Resort", "RailwayStation"},
    {"Pond", "River", "Port", "Beach", "Bridge", "Viaduct"},
    {"BareLand", "Desert", "Farmland", "Forest", "Meadow", "Mountain"},
    {"Airport", "Parking", "RailwayStation", "Industrial", "StorageTanks", "Playground"},
]


def absent(scene: str, draw: random.Random) -> str:
    """A class that the scene is not; half of the time an easily confused one."""
    near = sorted({c for group in CONFUSED if scene in group for c in group} - {scene})
    pool = near if near and draw.random() < 0.5 else sorted(set(SCENES) - {scene})
    return SCENES[draw.choice(pool)]


def scene_questions(
    scene: str, captions: list[str], draw: random.Random, count: int
) -> list[Question]:
    """Questions on one scene image; the first always asks for its name."""
    name = SCENES[scene]
    found = [Question(fill(draw.choice(SCENE), draw), name, "scene")]
    for _ in range(count - 1):
        roll = draw.random()
        if roll < 0.33 and captions:
            found.append(
                Question(fill(draw.choice(CAPTION), draw), draw.choice(captions), "caption")
            )
        elif roll < 0.52:
            found.append(Question(fill(draw.choice(SCENE), draw), name, "scene"))
        elif roll < 0.66:
            found.append(Question(presence(name, draw), "yes", "presence", focus=name))
        elif roll < 0.80:
            other = absent(scene, draw)
            found.append(Question(presence(other, draw), "no", "presence", focus=other))
        elif roll < 0.88 and scene in URBAN | RURAL_SCENES:
            answer = "urban" if scene in URBAN else "rural"
            found.append(Question(fill(draw.choice(RURAL), draw), answer, "rural"))
        else:
            listed, letter = options(name, draw)
            found.append(Question(draw.choice(CHOICE).format(options=listed), letter, "choice"))
    return found


def position(box: list[float]) -> str:
    """Where a box's centre lies, in words."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    columns, rows = ("left", "center", "right"), ("top", "middle", "bottom")
    column, row = columns[min(int(x * 3), 2)], rows[min(int(y * 3), 2)]
    if row == "middle":
        return column
    return row if column == "center" else f"{row} {column}"


def mosaic_questions(picture: dict[str, Any], draw: random.Random, count: int) -> list[Question]:
    """Questions on a mosaic of scenes."""
    regions = picture["regions"]
    found: list[Question] = []
    shown = [r["label"] for r in regions]
    for _ in range(count):
        at = draw.randrange(len(regions))
        name, where = SCENES[shown[at]], position(regions[at]["box"])
        roll = draw.random()
        if roll < 0.36:
            text = fill(draw.choice(PLACE_AT), draw, where=where)
            found.append(Question(text, name, "place", (at,), where))
        elif roll < 0.64:
            text = fill(draw.choice(WHERE), draw, name=name)
            found.append(Question(text, where, "where", (at,), name))
        elif roll < 0.78:
            found.append(Question(presence(name, draw), "yes", "presence", (at,), name))
        elif roll < 0.90:
            missing = SCENES[draw.choice(sorted(set(SCENES) - set(shown)))]
            found.append(Question(presence(missing, draw), "no", "presence", focus=missing))
        else:
            answer = ", ".join(SCENES[s] for s in shown)
            found.append(Question(fill(draw.choice(LISTING), draw), answer, "listing"))
    return found


def most(regions: list[dict[str, Any]], indices: list[int]) -> str | None:
    """The part of the picture that holds most of these boxes, where one clearly does."""
    places = Counter(position(regions[i]["box"]) for i in indices).most_common(2)
    if places[0][1] * 2 < len(indices) or (len(places) > 1 and places[0][1] == places[1][1]):
        return None
    return places[0][0]


class ObjectAsker:
    """Questions on one photograph's boxes; absence and counts only where labels are complete."""

    def __init__(self, picture: dict[str, Any], draw: random.Random) -> None:
        self.picture, self.draw = picture, draw
        self.regions = picture["regions"]
        self.names = {**OBJECT_NAMES, "plane": ("plane", "planes")}
        self.held: dict[str, list[int]] = {}
        for i, region in enumerate(self.regions):
            label = region["label"]
            if label in OBJECT_NAMES:
                self.held.setdefault(label, []).append(i)
            if label in PLANES:
                self.held.setdefault("plane", []).append(i)

    def visible(self, _label: str) -> Question:
        """Which kinds there are, the most frequent first."""
        kinds = sorted((k for k in self.held if k != "plane"), key=lambda k: -len(self.held[k]))[:4]
        everything = tuple(i for k in kinds for i in self.held[k])
        answer = ", ".join(self.names[k][1] for k in kinds)
        return Question(fill(self.draw.choice(OBJECTS), self.draw), answer, "objects", everything)

    def present(self, label: str) -> Question:
        """Yes."""
        name = self.draw.choice(self.names[label])
        asked = presence(name, self.draw)
        return Question(asked, "yes", "presence", tuple(self.held[label]), name)

    def missing(self) -> Question | None:
        """No; SIMD boxes are incomplete, so there only what would hardly be missed is absent."""
        absent_kinds = [k for k in self.picture["labelled"] if k in self.names]
        if self.picture["kind"] == "simd":
            apart = ["airliner", "boat", "helicopter"] if len(self.held) > 1 else []
            absent_kinds = [k for k in apart if k != "airliner" or "plane" not in self.held]
        absent_kinds = [k for k in absent_kinds if k not in self.held]
        if not absent_kinds:
            return None
        name = self.names[self.draw.choice(absent_kinds)][0]
        asked = presence(name, self.draw)
        return Question(asked, "no", "presence", focus=name)

    def where(self, label: str) -> Question | None:
        """The part of the picture with most of them."""
        place = most(self.regions, self.held[label])
        asked = fill(self.draw.choice(MOST), self.draw, names=self.names[label][1])
        shown = tuple(self.held[label])
        name = self.names[label][1]
        return Question(asked, place, "where", shown, name) if place else None

    def count(self, label: str) -> Question | None:
        """How many, up to six."""
        if self.picture["kind"] != "open" or len(self.held[label]) > 6:
            return None
        asked = fill(self.draw.choice(COUNT), self.draw, names=self.names[label][1])
        answer = NUMBERS[len(self.held[label])]
        shown = tuple(self.held[label])
        return Question(asked, answer, "count", shown, self.names[label][1])

    def ask(self) -> Question | None:
        """One question of a random kind, or none where it cannot be answered."""
        kinds = [self.visible, self.present, None, self.where, self.count]
        kind = self.draw.choices(kinds, [0.2, 0.25, 0.15, 0.25, 0.15])[0]
        if kind is None:
            return self.missing()
        return kind(self.draw.choice(sorted(self.held))) if self.held else None


def object_questions(picture: dict[str, Any], draw: random.Random, count: int) -> list[Question]:
    """Questions on boxed objects."""
    asker = ObjectAsker(picture, draw)
    found = (asker.ask() for _ in range(count * 3))
    return [question for question in found if question][:count]


def every_text() -> list[str]:
    """All wording there is, filled with every name: what the vocabulary must spell well."""
    texts: list[str] = [*CAPTION, *SCENE, *LISTING, *RURAL, *OBJECTS, *NUMBERS, "yes", "no"]
    places = [f"{r} {c}" for r in ("top", "bottom") for c in ("left", "right", "center")]
    places += ["left", "right", "center", "top", "bottom", "middle", "urban", "rural"]
    texts += places
    names = list(SCENES.values()) + [n for pair in OBJECT_NAMES.values() for n in pair]
    for name in [*names, "plane", "planes"]:
        words = {"name": name, "names": name, "a": with_article(name), "where": "top left"}
        words |= {"upper": name.upper(), "options": f"(A) {name} (B) {name} (C) {name} (D) {name}"}
        for template in PRESENCE + WHERE + MOST + COUNT + CHOICE + PLACE_AT:
            texts.append(template.format(**words))
        texts += [f"{name}, {name}", name, name.capitalize()]
    return texts
