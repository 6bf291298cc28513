"""Questions about boxed pictures: answers agree with the boxes, and none pays without a look."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scripts import TRAIN, scripts

PLANES = frozenset({"airplane", "airliner", "propeller"})
ROAD = frozenset({"vehicle", "car", "van", "truck", "bus"})
#: What people call things, and the labels that are one.
CALLED: tuple[tuple[tuple[str, ...], frozenset[str]], ...] = (
    (("airplane", "plane", "aircraft", "aeroplane"), PLANES),
    (("ship", "boat", "vessel"), frozenset({"ship", "boat"})),
    (("vehicle", "road vehicle"), ROAD),
    (("car", "automobile"), frozenset({"car", "vehicle"})),
    (("harbor", "dock", "pier", "port"), frozenset({"harbor"})),
    (("storage tank", "oil tank", "tank"), frozenset({"storage tank"})),
    (("baseball diamond", "baseball field"), frozenset({"baseball diamond"})),
    (("football field", "soccer field"), frozenset({"ground track field"})),
    (("sports field",), frozenset({"ground track field", "baseball diamond"})),
    *(((one,), frozenset({one})) for one in ("bridge", "bus", "truck", "airliner", "helicopter")),
)
LABELS = sorted({label for _, labels in CALLED for label in labels})


def plural(name: str) -> str:
    return name if name == "aircraft" else f"{name}es" if name.endswith("s") else f"{name}s"


NAMES = {form: labels for names, labels in CALLED for n in names for form in (n, plural(n))}


@pytest.fixture(scope="module")
def boxed() -> Iterator[SimpleNamespace]:
    """The modules."""
    with scripts(TRAIN) as importer:
        parts = ("questions", "wording", "things", "cover")
        modules = {part: importer(f"boxed_{part}") for part in parts}
        text = "\n".join(modules["questions"].every_text()).lower()
        spelled = set(re.findall(r"\w+", text))
        yield SimpleNamespace(**modules, spelled=spelled, position=importer("questions").position)


@st.composite
def pictures(draw: st.DrawFn) -> dict[str, Any]:
    """Boxes of a few labels, some of which are complete."""
    some = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=3, unique=True))
    regions = []
    for label in draw(st.lists(st.sampled_from(some), max_size=12)):
        x, y = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
        width, height = draw(st.floats(0.01, 0.1)), draw(st.floats(0.01, 0.1))
        regions.append({"label": label, "box": [x, y, x + width, y + height]})
    complete = draw(st.lists(st.sampled_from(LABELS), unique=True))
    picture: dict[str, Any] = {
        "regions": regions,
        "complete": complete,
        "width": 1000,
        "height": 800,
    }
    if draw(st.booleans()):
        share = st.sampled_from([0.0, 0.0, 0.1, 0.4, 0.9])
        grid = st.lists(st.lists(share, min_size=3, max_size=3), min_size=3, max_size=3)
        picture["cover"] = {name: draw(grid) for name in ("water", "vegetation", "building")}
    return picture


def asked(boxed: SimpleNamespace, picture: dict[str, Any], seed: int) -> list[Any]:
    balance = boxed.things.Balance()
    found: list[Any] = boxed.questions.boxed_questions(picture, random.Random(seed), 60, balance)
    return found


def held(picture: dict[str, Any], name: str) -> list[int]:
    return [i for i, r in enumerate(picture["regions"]) if r["label"] in NAMES[name]]


def halves(picture: dict[str, Any], index: int, margin: float) -> set[str]:
    x0, y0, x1, y1 = picture["regions"][index]["box"]
    x, y = (x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5
    sides = {"left": -x, "right": x, "top": -y, "bottom": y, "upper": -y, "lower": y}
    return {side for side, at in sides.items() if at > margin}


@settings(max_examples=40, deadline=None)
@given(picture=pictures(), seed=st.integers(0, 1000))
def test_words_answers_and_evidence_are_well_formed(
    boxed: SimpleNamespace, picture: dict[str, Any], seed: int
) -> None:
    for question in asked(boxed, picture, seed):
        text, focus = question.text.lower(), question.focus.lower()
        assert not re.search(r"[\[\]{}_]|  ", text)
        # The sequence's writer takes the last place of the focus in the text.
        at = text.rfind(focus)
        assert not focus or re.search(rf"(?<!\w){re.escape(focus)}(?!\w)", text[max(at - 1, 0) :])
        assert 1 <= len(question.answer.split(",")[0].split()) <= 3
        assert {int(i) for i in question.evidence} <= set(range(len(picture["regions"])))
        assert len(set(question.evidence)) == len(question.evidence) or question.kind == "compare"
        assert set(re.findall(r"\w+", f"{text} {question.answer}")) <= boxed.spelled


@settings(max_examples=40, deadline=None)
@given(picture=pictures(), seed=st.integers(0, 1000))
def test_answers_agree_with_the_boxes(
    boxed: SimpleNamespace, picture: dict[str, Any], seed: int
) -> None:
    for question in asked(boxed, picture, seed):
        name = question.focus.lower()
        if name not in NAMES:
            continue
        indices = held(picture, name)
        text = question.text.lower()
        part = re.search(r"\b(left|right|top|bottom|upper|lower) half\b", text)
        if question.kind == "presence":
            assert question.answer == ("yes" if indices else "no")
            assert sorted(question.evidence) == indices
        elif question.kind == "half":
            assert part
            inside = [i for i in indices if part[1] in halves(picture, i, 0.05)]
            assert (question.answer, sorted(question.evidence)) == (
                "yes" if inside else "no",
                inside,
            )
        elif question.kind == "side":
            assert all(question.answer in halves(picture, i, 0.05) for i in indices)
        elif question.kind == "count":
            counted = [i for i in indices if i in question.evidence]
            assert question.answer == str(len(counted))
            if part:
                assert counted == [i for i in indices if part[1] in halves(picture, i, 0)]
            elif not re.search("top|left|right|cent|middle|bottom|upper|lower", text):
                assert counted == indices
        elif question.kind == "where":
            places = [boxed.position(picture["regions"][i]["box"]) for i in indices]
            assert places.count(question.answer) >= 0.6 * len(places) > 0


@settings(max_examples=40, deadline=None)
@given(picture=pictures(), seed=st.integers(0, 1000))
def test_absence_and_counts_need_complete_labels(
    boxed: SimpleNamespace, picture: dict[str, Any], seed: int
) -> None:
    picture = picture | {"complete": [], "cover": {}}
    for question in asked(boxed, picture, seed):
        assert question.kind not in ("count", "compare", "option", "beside", "objects")
        assert question.answer != "no" or question.kind == "relation"


@settings(max_examples=40, deadline=None)
@given(picture=pictures(), seed=st.integers(0, 1000))
def test_answers_about_cover_agree_with_its_shares(
    boxed: SimpleNamespace, picture: dict[str, Any], seed: int
) -> None:
    picture = picture | {"regions": [], "complete": []}
    names = {n: k for k, some in boxed.cover.COVER_NAMES.items() for n in some}
    for question in asked(boxed, picture, seed):
        name = names.get(question.focus.lower())
        if name is None:
            continue
        shares = picture["cover"][name]
        total = sum(map(sum, shares)) / 9
        if question.kind == "presence":
            assert question.answer == ("yes" if total else "no")
        elif question.kind == "side":
            lines = [sum(r) for r in shares]
            if question.answer in ("left", "right"):
                lines = [sum(column) for column in zip(*shares, strict=True)]
            here, there = lines[0], lines[2]
            assert here > there if question.answer in ("left", "top") else there > here
        elif question.kind == "where":
            row, column = divmod(list(boxed.wording.PARTS).index(question.answer), 3)
            assert shares[row][column] == max(map(max, shares))


def test_the_text_alone_does_not_tell(boxed: SimpleNamespace) -> None:
    """Over pictures in which some things are far more common than others."""
    draw, balance = random.Random(5), boxed.things.Balance()
    kinds = ["airplane", "ship", "harbor", "bridge", "storage tank", "tennis court"]
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _ in range(500):
        regions = []
        for label in draw.choices(kinds, [20, 6, 3, 2, 1, 4], k=draw.choice((1, 2))):
            for _ in range(draw.choice((1, 1, 1, 1, 2, 3, 5, 8))):
                x, y = draw.random() * 0.9, draw.random() * 0.9
                regions.append({"label": label, "box": [x, y, x + 0.05, y + 0.05]})
        picture = {"regions": regions, "complete": kinds, "width": 1000, "height": 1000}
        for question in boxed.questions.boxed_questions(picture, draw, 12, balance):
            about = question.focus.lower()
            about = about if question.kind in ("presence", "half") else ""
            answers[question.kind, about][question.answer] += 1
    for (kind, _), found in answers.items():
        if set(found) <= {"yes", "no"} and sum(found.values()) >= 60:
            assert 0.35 < found["yes"] / sum(found.values()) < 0.65, (kind, found)
    sides = answers["side", ""]
    assert max(sides.values()) < 1.3 * min(sides.values())
    counts = answers["count", ""]
    assert counts["1"] < 0.4 * sum(counts.values())


def test_the_same_draw_asks_the_same(boxed: SimpleNamespace) -> None:
    boxes = [[0.1, 0.1, 0.2, 0.2], [0.7, 0.2, 0.8, 0.25], [0.4, 0.8, 0.5, 0.9]]
    regions = [{"label": label, "box": box} for label, box in zip(LABELS, boxes, strict=False)]
    picture = {"regions": regions, "complete": LABELS, "width": 9, "height": 9}
    assert asked(boxed, picture, 3) == asked(boxed, picture, 3)


def test_every_kind_has_eight_wordings(boxed: SimpleNamespace) -> None:
    for module in (boxed.wording, boxed.cover):
        for name, value in vars(module).items():
            texts = value if isinstance(value, tuple) else ()
            if any("{" in t or "?" in t for t in texts if isinstance(t, str)):
                assert len(set(texts)) >= 8, name
    assert all(len(set(texts)) >= 8 for texts in boxed.wording.USES.values())


def test_things_are_named_as_lrs_vqa_names_them(boxed: SimpleNamespace) -> None:
    """The top-most bridge, the right-most and largest airplane, what is left of the smallest."""
    regions = [
        {"label": "bridge", "box": [0.1, 0.05, 0.2, 0.1]},
        {"label": "bridge", "box": [0.3, 0.6, 0.5, 0.7]},
        {"label": "airplane", "box": [0.8, 0.3, 0.95, 0.45]},
        {"label": "airplane", "box": [0.15, 0.4, 0.2, 0.45]},
    ]
    picture = {"regions": regions, "complete": ["bridge", "airplane"], "width": 9, "height": 9}
    found = [q for seed in range(150) for q in asked(boxed, picture, seed)]
    texts = [q.text.lower() for q in found]
    assert any("top-most bridge" in text for text in texts)
    assert any("right-most and largest airplane" in text for text in texts)
    assert any("smallest" in text and "left of" in text for text in texts)
    assert any(boxed.wording.SUFFIX in q.text for q in found)
    related = [q for q in found if q.kind == "relation"]
    upright = [q for q in related if re.search("above|below|higher|lower", q.text.lower())]
    high = r"(top-?most|uppermost) (and \w+ )?bridge .*(above|higher|below|lower).*(plane|aircraft)"
    answers = [(re.search(high, q.text.lower()), q.answer) for q in upright]
    told = {(match[3], answer) for match, answer in answers if match}
    assert told == {("above", "yes"), ("higher", "yes"), ("below", "no"), ("lower", "no")}
    # Of two things of one name, a word such as top-most would give the answer away.
    for question in upright:
        bridges = len(re.findall("bridge", question.text.lower()))
        assert bridges < 2 or not re.search("top-?most|upper|bottom|lowest", question.text.lower())
