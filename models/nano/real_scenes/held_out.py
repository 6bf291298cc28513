"""Questions about held-out real images: for thresholds and calibration, never for training.

    python models/nano/real_scenes/held_out.py ../shared/data -o FOLDER
    lrs-edge eval FOLDER/held_out.jsonl --images ../shared/data -o results.jsonl --no-synonyms
    lrs-edge calibrate results.jsonl -o BUNDLE --no-synonyms

About 300 questions in the form of LRS-VQA's file, on the `test` split of vhr10_rgb and the `val`
splits of airport_338 and simd552_640 (`labels.py` says what is trusted): presence (as often no as
yes, in every class), side (left, right, top and bottom equally often), count (1 to 9) and position
(nine parts), with the boxes of their evidence. Wordings are others than real_eval's, which stays
apart. The same DATA gives the same file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from labels import CLASSES, Box, Labelled, read

from lrs_edge.objects.note import NINTHS

_PER_CLASS = 10
"""Most images with a class that are asked about its presence, and as many without."""
_PER_SIDE = 12
_PER_COUNT = 5
_PER_NINTH = 4
_MOST_COUNTED = 9
_CLEAR = 0.04
"""Share of the width or height around the lines between ninths where no centre may lie."""

_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "airplane": (("airplane", "airplanes"), ("plane", "planes"), ("aircraft", "aircraft")),
    "ship": (("ship", "ships"), ("vessel", "vessels"), ("boat", "boats")),
    "storage tank": (("storage tank", "storage tanks"),),
    "baseball diamond": (
        ("baseball diamond", "baseball diamonds"),
        ("baseball field", "baseball fields"),
    ),
    "tennis court": (("tennis court", "tennis courts"),),
    "basketball court": (("basketball court", "basketball courts"),),
    "ground track field": (
        ("running track", "running tracks"),
        ("ground track field", "ground track fields"),
    ),
    "harbor": (("harbor", "harbors"), ("harbour", "harbours")),
    "bridge": (("bridge", "bridges"),),
    "vehicle": (("vehicle", "vehicles"), ("car", "cars")),
}
_SHORT = " Answer the question using a single word or phrase."
_PRESENCE = (
    "Is {a} visible in this picture?", "Does this scene contain {many}?", "Do you see {a} here?",
    "Does the image show any {many}?" + _SHORT, "Can {a} be found in this aerial image?",
)  # fmt: skip
_COUNT = (
    "What is the number of {many} in this scene?", "Count the {many} in the picture.",
    "How many {many} can be seen?" + _SHORT, "How many {many} does the image show?",
)  # fmt: skip
_SIDE = (
    "Which half of the image {is} the {them} in, {first} or {second}?",
    "{First} or {second} half: where {is} the {them}?",
    "Do you find the {them} in the {first} or in the {second} half of the picture?" + _SHORT,
)
_POSITION = (
    "In which part of the picture is the {one}?", "Where does the {one} lie in the image?",
    "Where in the image can the {one} be found?" + _SHORT,
)  # fmt: skip
_SIDES = (("left", "right"), ("top", "bottom"))


@dataclass(frozen=True)
class Question:
    """A row of the file, with the field names of LRS-VQA; `thing` is the class of the boxes."""

    question_id: str
    image: str
    category: str
    text: str
    ground_truth: str
    dataset: str
    thing: str
    hbox: tuple[Box, ...]


def sides(boxes: Sequence[Box], width: int, height: int) -> set[str]:
    """Halves of the image that hold all of the boxes whole."""
    across, down = width / 2, height / 2
    every = {
        "left": all(box[2] <= across for box in boxes),
        "right": all(box[0] >= across for box in boxes),
        "top": all(box[3] <= down for box in boxes),
        "bottom": all(box[1] >= down for box in boxes),
    }
    return {name for name, holds in every.items() if holds and boxes}


def ninth(box: Box, width: int, height: int) -> str | None:
    """Which ninth a box lies in; None where that is not clear.

    Its centre must be `_CLEAR` away from the lines, and no side longer than a ninth's.
    """
    places = []
    for low, high, size in ((box[1], box[3], height), (box[0], box[2], width)):
        centre = (low + high) / 2 / size
        if high - low > size / 3 or min(abs(centre - 1 / 3), abs(centre - 2 / 3)) < _CLEAR:
            return None
        places.append(min(int(3 * centre), 2))
    return NINTHS[places[0]][places[1]]


class Maker:
    """Makes questions; images that were asked about least come first."""

    def __init__(self, images: Iterable[Labelled], seed: int = 0) -> None:
        self._images = list(images)
        self._random = random.Random(seed)
        self._used: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self.questions: list[Question] = []

    def make(self) -> list[Question]:
        """All questions, image by image."""
        for name in CLASSES:
            self._presence(name)
        self._balanced("side", _PER_SIDE, _side_answers)
        self._balanced("count", _PER_COUNT, _count_answers)
        self._balanced("position", _PER_NINTH, _position_answers)
        return sorted(self.questions, key=lambda question: question.image)

    def _presence(self, name: str) -> None:
        shown = [image for image in self._images if name in image.boxes]
        without = [image for image in self._images if image.lacks(name)]
        count = min(len(shown), len(without), _PER_CLASS)
        # A pair of yes and no has the same words: they say nothing about the answer.
        for place, pair in enumerate(
            zip(self._fresh(shown)[:count], self._fresh(without)[:count], strict=True)
        ):
            one, many = _NAMES[name][place % len(_NAMES[name])]
            text = _PRESENCE[place % len(_PRESENCE)].format(a=_with_article(one), many=many)
            for image, answer in zip(pair, ("yes", "no"), strict=True):
                self._add(image, "presence", name, text, answer)

    def _balanced(
        self,
        category: str,
        most: int,
        answers: Callable[[Labelled, str, tuple[Box, ...]], set[str]],
    ) -> None:
        """Questions of one kind, every answer at most so often."""
        places: dict[str, list[tuple[Labelled, str]]] = defaultdict(list)
        for image in self._images:
            for name, boxes in image.boxes.items():
                if image.is_whole(name):
                    for answer in answers(image, name, boxes):
                        places[answer].append((image, name))
        for answer in sorted(places):
            self._random.shuffle(places[answer])
            # A class that was asked about before comes after the others.
            classes: Counter[str] = Counter()
            for _ in range(min(most, len(places[answer]))):
                image, name = min(
                    places[answer], key=lambda place: (classes[place[1]], self._used[place[0].file])
                )
                places[answer].remove((image, name))
                classes[name] += 1
                text = self._words(category, name, answer, len(image.boxes[name]))
                self._add(image, category, name, text, answer)

    def _words(self, category: str, name: str, answer: str, number: int) -> str:
        one, many = self._random.choice(_NAMES[name])
        if category == "count":
            return self._random.choice(_COUNT).format(many=many)
        if category == "position":
            return self._random.choice(_POSITION).format(one=one)
        pair = next(pair for pair in _SIDES if answer in pair)
        first, second = self._random.sample(pair, 2)
        return self._random.choice(_SIDE).format(
            **{"is": "is" if number == 1 else "are", "them": one if number == 1 else many},
            **{"first": first, "second": second, "First": first.capitalize()},
        )

    def _fresh(self, images: list[Labelled]) -> list[Labelled]:
        self._random.shuffle(images)
        return sorted(images, key=lambda image: self._used[image.file])

    def _add(self, image: Labelled, category: str, name: str, text: str, answer: str) -> None:
        self._used[image.file] += 1
        self._asked[category] += 1
        self.questions.append(
            Question(
                question_id=f"{category}-{self._asked[category]:03}",
                image=image.image,
                category=category,
                text=text,
                ground_truth=answer,
                dataset=image.folder,
                thing=name,
                hbox=image.boxes.get(name, ()),
            )
        )


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _side_answers(image: Labelled, name: str, boxes: tuple[Box, ...]) -> set[str]:
    # A harbor is an area: its boxes are single piers.
    return set() if name == "harbor" else sides(boxes, image.width, image.height)


def _count_answers(_: Labelled, name: str, boxes: tuple[Box, ...]) -> set[str]:
    return {str(len(boxes))} if name != "harbor" and len(boxes) <= _MOST_COUNTED else set()


def _position_answers(image: Labelled, name: str, boxes: tuple[Box, ...]) -> set[str]:
    if name == "harbor" or len(boxes) != 1:
        return set()
    return {place for place in [ninth(boxes[0], image.width, image.height)] if place}


def main() -> None:
    """Write the question file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with vhr10_rgb and the others")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args()
    questions = Maker(read(options.data)).make()
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "held_out.jsonl"
    lines = "".join(f"{json.dumps(asdict(question))}\n" for question in questions)
    target.write_text(lines, encoding="utf-8")
    counts = Counter(question.category for question in questions)
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{target}: {len(questions)} questions ({said})")


if __name__ == "__main__":
    main()
