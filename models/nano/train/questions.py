"""Training questions and answers, in varied wording, for scenes, mosaics and photographs.

Everything here is text: a `PictureQuestion` has its wording, its answer and, where known, the
regions that hold the evidence. Wording templates come first so that the vocabulary can be built
from them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from common import SCENE_QUESTION, SCENES

from lrs_edge_export.scenes.plan import ScenePlan
from lrs_edge_export.scenes.questions import every_text as every_scene_text
from lrs_edge_export.scenes.questions import scene_questions as plan_questions

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
RURAL = ["Is this a rural or an urban area?", "Rural or urban?", "Is the area rural or urban?"]
OBJECTS = [
    "What objects are visible?", "Which vehicles can be seen?", "What objects can be seen?",
    "List the objects in the image.", "What kinds of vehicles are in this image?",
]  # fmt: skip
MOST = ["Where are most {names}?", "Where are the {names}?", "In which part are most {names}?"]
MOST_PLAIN = [
    "Where are the {names}?", "Where can I find {names}?", "where are the {names}",
    "In which part of the image are the {names}?", "Find the {names}.", "Locate the {names}.",
]  # fmt: skip
PRESENCE_PLURAL = [
    "Are there any {names}?", "Are there {names} in this image?", "Can you see any {names}?",
    "Do you see {names}?", "Are any {names} visible?", "{names}?", "any {names} here",
    "Does the image show {names}?",
]  # fmt: skip
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
SYNONYMS: dict[str, list[tuple[str, str]]] = {
    "boat": [("ship", "ships"), ("ship", "ships"), ("vessel", "vessels")],
    "plane": [("airplane", "airplanes"), ("aircraft", "aircraft"), ("aeroplane", "aeroplanes")],
    "airliner": [("large plane", "large planes"), ("passenger plane", "passenger planes")],
    "car": [("parked car", "parked cars"), ("automobile", "automobiles")],
    "building": [("house", "houses")],
    "truck": [("lorry", "lorries")],
    "vehicle": [("road vehicle", "road vehicles")],
}
"""Other words for an object, as people ask."""
ROAD_VEHICLES = {"car", "van", "truck", "bus", "minibus", "longvehicle"}
THINGS: dict[str, tuple[set[str], list[tuple[str, str]], set[str]]] = {
    "plane": (
        {"plane", "planes", "airplane", "airplanes"},
        [("plane", "planes"), ("airplane", "airplanes"), ("aircraft", "aircraft")],
        {"Airport"},
    ),
    "boat": (
        {"boat", "boats", "ship", "ships", "yachts"},
        [("boat", "boats"), ("ship", "ships"), ("vessel", "vessels")],
        {"Port", "Bridge", "River", "Beach", "Resort", "Pond", "Center", "StorageTanks", "Park"},
    ),
    "train": (
        {"train", "trains"},
        [("train", "trains")],
        {"RailwayStation", "StorageTanks", "Industrial", "Viaduct", "Bridge", "Port"},
    ),
    "tank": (
        {"tank", "tanks"},
        [("oil tank", "oil tanks"), ("tank", "tanks")],
        {"StorageTanks", "Industrial", "Port", "Airport", "Farmland"},
    ),
    "car": ({"car", "cars"}, [("car", "cars"), ("vehicle", "vehicles")], set()),
    "pool": ({"pool", "pools"}, [("swimming pool", "swimming pools")], {
        "SparseResidential", "MediumResidential", "DenseResidential", "Resort", "Pond", "Park",
        "Center", "School", "Playground", "Square", "Stadium", "Church", "Commercial",
    }),
}  # fmt: skip
"""Things that captions mention: their words there, how people ask, and the classes of scenes that
may show one (none: any class may)."""
PLANES = {"airliner", "chartered", "trainer", "propeller", "fighter"}
"""SIMD classes that a person would call a plane."""


@dataclass(frozen=True)
class PictureQuestion:
    """One question with its answer; evidence holds the indices of the regions that show it."""

    text: str
    answer: str
    kind: str
    evidence: tuple[int, ...] = field(default=())
    boxes: tuple[tuple[float, float, float, float], ...] = field(default=())
    """Evidence that is not a region of the picture, in shares of width and height."""
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
) -> list[PictureQuestion]:
    """Questions on one scene image; the first always asks for its name."""
    name = SCENES[scene]
    found = [PictureQuestion(fill(draw.choice(SCENE), draw), name, "scene")]
    for _ in range(count - 1):
        roll = draw.random()
        if roll < 0.33 and captions:
            found.append(
                PictureQuestion(fill(draw.choice(CAPTION), draw), draw.choice(captions), "caption")
            )
        elif roll < 0.52:
            found.append(PictureQuestion(fill(draw.choice(SCENE), draw), name, "scene"))
        elif roll < 0.66:
            found.append(PictureQuestion(presence(name, draw), "yes", "presence", focus=name))
        elif roll < 0.80:
            other = absent(scene, draw)
            found.append(PictureQuestion(presence(other, draw), "no", "presence", focus=other))
        elif roll < 0.88 and scene in URBAN | RURAL_SCENES:
            answer = "urban" if scene in URBAN else "rural"
            found.append(PictureQuestion(fill(draw.choice(RURAL), draw), answer, "rural"))
        elif roll < 0.94:
            found += thing_question(scene, captions, draw)
        else:
            listed, letter = options(name, draw)
            found.append(
                PictureQuestion(draw.choice(CHOICE).format(options=listed), letter, "choice")
            )
    return found


def mentions(captions: list[str], thing: str) -> bool:
    """Whether a caption names the thing."""
    return any(THINGS[thing][0] & set(caption.split()) for caption in captions)


def thing_question(scene: str, captions: list[str], draw: random.Random) -> list[PictureQuestion]:
    """Whether a thing is there that captions of such scenes mention; none where that is unknown."""
    thing = draw.choice(sorted(THINGS))
    _, words, classes = THINGS[thing]
    there = mentions(captions, thing)
    if not there and (not classes or scene in classes):
        return []
    singular, several = draw.choice(words)
    if draw.random() < 0.4:
        asked, name = presence(singular, draw), singular
    else:
        asked, name = fill(draw.choice(PRESENCE_PLURAL), draw, names=several), several
    return [PictureQuestion(asked, "yes" if there else "no", "thing", focus=name)]


def large_questions(plan: ScenePlan, draw: random.Random, count: int) -> list[PictureQuestion]:
    """Questions on one large scene."""
    return [
        PictureQuestion(q.text, q.answer, q.category, (), in_shares(plan, q.boxes), q.focus)
        for q in plan_questions(plan, draw, count)
    ]


def in_shares(
    plan: ScenePlan, boxes: tuple[tuple[int, int, int, int], ...]
) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes of scene pixels as shares of width and height."""
    return tuple(
        (a / plan.width, b / plan.height, c / plan.width, d / plan.height) for a, b, c, d in boxes
    )


def hidden_objects(
    plan: ScenePlan, captions: dict[str, list[str]], draw: random.Random, count: int
) -> list[PictureQuestion]:
    """Questions on things that captions of a large scene's places mention: planes, boats, tanks."""
    spoken = {label: scene for scene, label in SCENES.items()}
    under = {spoken[label] for label in plan.background.labels}
    found: list[PictureQuestion] = []
    for thing in draw.sample(sorted(THINGS), count):
        _, words, classes = THINGS[thing]
        holding = [p for p in plan.placements if mentions(captions[p.tile.path.name], thing)]
        maybe = [
            p for p in plan.placements
            if p not in holding and (not classes or spoken[p.label] in classes)
        ]  # fmt: skip
        clear = not maybe and bool(classes) and not under & classes
        boxes = in_shares(plan, tuple(p.box for p in holding))
        singular, several = draw.choice(words)
        if holding and clear and len(holding) == 1 and draw.random() < 0.5:
            x0, y0, x1, y1 = boxes[0]
            asked = fill(draw.choice(MOST_PLAIN), draw, names=several)
            found.append(
                PictureQuestion(asked, position([x0, y0, x1, y1]), "where", (), boxes, several)
            )
        elif holding:
            asked = fill(draw.choice(PRESENCE_PLURAL), draw, names=several)
            found.append(PictureQuestion(asked, "yes", "thing", (), boxes, several))
        elif clear:
            asked = presence(singular, draw)
            found.append(PictureQuestion(asked, "no", "thing", focus=singular))
    return found


def position(box: list[float]) -> str:
    """Where a box's centre lies, in words."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    columns, rows = ("left", "center", "right"), ("top", "middle", "bottom")
    column, row = columns[min(int(x * 3), 2)], rows[min(int(y * 3), 2)]
    if row == "middle":
        return column
    return row if column == "center" else f"{row} {column}"


def every_text() -> list[str]:
    """All wording there is, filled with every name: what the vocabulary must spell well."""
    texts: list[str] = [*CAPTION, *SCENE, *RURAL, *OBJECTS, "yes", "no", "urban", "rural"]
    pairs = [*OBJECT_NAMES.values(), *(pair for some in SYNONYMS.values() for pair in some)]
    pairs += [pair for _, some, _ in THINGS.values() for pair in some]
    names = list(SCENES.values()) + [n for pair in pairs for n in pair]
    for name in names:
        words = {"name": name, "names": name, "a": with_article(name)}
        words |= {"upper": name.upper(), "options": f"(A) {name} (B) {name} (C) {name} (D) {name}"}
        for template in PRESENCE + PRESENCE_PLURAL + MOST + MOST_PLAIN + COUNT + CHOICE:
            texts.append(template.format(**words))
        texts += [f"{name}, {name}", name, name.capitalize()]
    return texts + every_scene_text(list(SCENES.values()))
