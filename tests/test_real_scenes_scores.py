"""The figures on real scenes: answers read, shares balanced, boxes under tiles, tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lrs_edge.evaluation.questions import read_questions
from lrs_edge.evaluation.results import FinestLevel, Result
from tests.scripts import Importer


@pytest.fixture
def scores(real_scenes: Importer) -> ModuleType:
    """The pure figures."""
    return real_scenes("scores")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("no, there are none", "no"),
        ("none", None),
        ("yesterday", None),
        (None, None),
    ],
)
def test_yes_and_no_are_first_words(scores: ModuleType, answer: str | None, said: str) -> None:
    assert scores.yes_or_no(answer) == said


def test_an_answer_that_names_both_sides_names_none(scores: ModuleType) -> None:
    assert scores.one_of("in the left half", ("left", "right")) == "left"
    assert scores.one_of("left or right", ("left", "right")) is None
    assert scores.one_of("1", ("left", "right")) is None
    assert scores.side_choices("Is it in the top or the bottom half?") == ("top", "bottom")


def test_numbers_are_digits_or_words(scores: ModuleType) -> None:
    texts = ("12 ships", "Three", "some", None)
    assert [scores.number(text) for text in texts] == [12, 3, None, None]
    assert str(scores.within([(3, 4), (3, None), (1, 1)], 1)) == "66.7 % (2/3)"


def test_an_open_answer_is_compared_without_its_point(scores: ModuleType) -> None:
    assert scores.is_right("Where?", "Top left.", "top left")
    assert not scores.is_right("Where?", "left", "top left")
    assert scores.is_right("In the left or the right half?", "on the right", "right")
    assert scores.is_right("Is there a road?", "yes, one", "yes")


def test_balanced_accuracy_is_the_mean_of_yes_and_no(scores: ModuleType) -> None:
    found = scores.presence([("yes", "yes")] * 9 + [("yes", "no")] + [("no", "yes"), ("no", "no")])
    assert found.balanced == pytest.approx(0.7)
    assert str(found.yes + found.no) == "83.3 % (10/12)"
    only = scores.presence([("yes", "yes")])
    assert only.balanced is None
    assert scores.mean_over_classes({"ship": found, "baseball field": only}) == pytest.approx(0.7)
    assert scores.mean_over_classes({}) is None
    assert scores.presence([("yes", None), ("no", "no")]).balanced == 0.5


def test_questions_name_their_class(scores: ModuleType) -> None:
    assert scores.thing("Is there a airplane in the image?") == "airplane"
    assert scores.thing("Are there any basketball courts?") == "basketball court"
    assert scores.thing("Is there a pond?") is None


def test_boxes_are_found_under_the_tile_of_their_centre(real_scenes: Importer) -> None:
    tiles = real_scenes("tiles")
    # An image of 200 x 100 pixels shown at twice its size in tiles of 100 pixels.
    level = FinestLevel(height=200, width=400, tile_rows=2, tile_cols=4, tiles=((0, 0), (1, 3)))
    boxes = [(0, 0, 20, 20), (40, 0, 56, 10), (52, 0, 60, 10), (190, 90, 200, 100)]
    assert tiles.tile_of(boxes[1], level, 100, (200, 100)) == (0, 0)
    found = tiles.under_tiles([*boxes, (52, 10, 60, 20)], level, 100, (200, 100))
    assert (found.boxes, found.found, found.best) == (5, 3, 4)
    assert found.expected == pytest.approx(5 * 2 / 8)
    both = tiles.total([found, found])
    assert (both.boxes, both.looked_at, both.tiles) == (10, 4, 16)


def result(index: int, category: str, prompt: str, truth: str, text: str) -> Result:
    """An answer without what was done for it."""
    return Result(
        index=index, question_id=f"fair1m-{index}", image="a.webp", category=category,
        dataset="fair1m", prompt=prompt, ground_truth=truth, text=text,
    )  # fmt: skip


def test_tables_show_the_model_beside_a_blind_one(real_scenes: Importer) -> None:
    tables = real_scenes("tables")
    ships, rounds = "Are there any ships?", "Are there any roundabouts?"
    half = "Is the ship in the left or the right half of the image?"
    results = [
        result(0, "presence", ships, "yes", "yes"),
        result(1, "presence", ships, "no", "no"),
        result(2, "presence", rounds, "yes", "no"),
        result(3, "side", half, "right", "right"),
        result(4, "count", "How many ships are there?", "3", "2"),
    ]  # fmt: skip
    blind = dict.fromkeys((each.prompt for each in results), "yes")
    lines = tables.presence_table(results, blind).splitlines()
    presence = {name: cells for name, *cells in (line[2:-2].split(" | ") for line in lines)}
    plain, mixed = (presence[f"all questions, {name}"] for name in (tables.PLAIN, tables.MIXED))
    every = "100.0 % (1/1)"
    assert plain == ["100.0 %", every, every, "100.0 % (2/2)", "50.0 %"]
    assert mixed == ["75.0 %", "50.0 % (1/2)", every, "66.7 % (2/3)", "50.0 %"]
    assert "| without them | 100.0 % (1/1) | 0.0 % (0/1) | 0.0 % (0/1) |" in tables.side_table(
        results, blind
    )
    counted = tables.count_table(results, blind)
    assert "| answers | 0.0 % (0/1) | 100.0 % (1/1) |" in counted
    assert "| always 1 | 0.0 % (0/1) | 0.0 % (0/1) |" in counted
    assert "wrong" in tables.dubai_table([results[2]], blind)


def test_the_summary_has_a_line_for_each_figure(real_scenes: Importer) -> None:
    summary = real_scenes("summary")
    ships, planes = "Are there any ships?", "Are there any airplanes?"
    half = "Is the roundabout in the top or the bottom half of the image?"
    real = [
        result(0, "presence", ships, "yes", "yes"),
        result(1, "presence", ships, "no", "no"),
        result(2, "presence", planes, "yes", "no"),
        result(3, "side", half, "top", "bottom"),
        result(4, "count", "How many ships are there?", "1", "2"),
    ]
    dubai = [result(0, "presence", "Is there an airport?", "no", "yes")]
    blind = {ships: "yes", planes: "yes", half: "top", "Is there an airport?": "no"}
    text = summary.summary({"real": real, "large": [], "dubai": dubai}, blind, 384)
    lines = {
        name: cells for name, *cells in (line[2:-2].split(" | ") for line in text.splitlines())
    }
    assert lines["presence, mean over 1 classes"] == ["100.0 %", "50.0 %", "90 %"]
    assert lines["presence, without intersections and roundabouts"][0] == "75.0 %"
    assert lines["side, all classes"][:2] == ["0.0 % (0/1)", "100.0 % (1/1)"]
    assert lines["side, without intersections and roundabouts"][0] == "-"
    assert lines["count, exact"][1] == "0.0 % (0/1); always 1: 100.0 %"
    assert lines["Dubai, yes to what is not there"] == ["100.0 % (1/1)", "0.0 % (0/1)", "0"]


def test_cost_is_the_median_of_turns(real_scenes: Importer) -> None:
    rows = [
        {"scene": "a", "this": [2.0, 1.0, 4.0, 1.0], "other": [1.0, 1.0, 2.0, 1.0]},
        {"scene": "a", "this": [3.0, 1.0, 4.0, 1.0], "other": [1.0, 1.0, 2.0, 1.0]},
        {"scene": "a", "this": [9.0, 1.0, 4.0, 1.0], "other": [2.0, 2.0, 2.0, 1.0]},
    ]
    text = real_scenes("cost").cost_table(rows)
    assert "| a | first question | 3.00 | 1.00 | 3.00 | 4.00 | 2.00 | 2.00 |" in text


def test_questions_about_dubai_can_be_asked(real_scenes: Importer) -> None:
    path = Path(real_scenes("scores").__file__).with_name("dubai.jsonl")
    questions = read_questions(path).questions
    assert {question.image for question in questions} == {
        f"images/scene{number}.webp" for number in (1, 4, 5)
    }
    assert len({question.question_id for question in questions}) == len(questions)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(question.boxes) for question in questions] == [len(row["hbox"]) for row in rows]


def test_water_is_spread_without_losing_its_waves(real_scenes: Importer) -> None:
    water = real_scenes("water")
    draw = np.random.default_rng(0)
    patch = (draw.normal(0, 8, (160, 200, 3)) + np.array([60, 90, 120])).astype(np.float32)
    scene = water.spread([patch], 500, 400, np.random.default_rng(1))
    assert scene.shape == (400, 500, 3)
    assert np.allclose(scene.mean((0, 1)), (60, 90, 120), atol=8)
    waves = scene[:, 1:] - scene[:, :-1]
    assert 0.8 < waves.std() / (patch[:, 1:] - patch[:, :-1]).std() < 1.2
    assert np.array_equal(scene, water.spread([patch], 500, 400, np.random.default_rng(1)))


def test_a_pasted_ship_keeps_its_middle_and_fades_at_its_edge(real_scenes: Importer) -> None:
    water = real_scenes("water")
    scene = np.full((100, 100, 3), 50, np.float32)
    cut = np.full((40, 30, 3), 80, np.float32)
    cut[10:30, 10:20] = 200
    box = water.paste(scene, cut, 10, 5, 7)
    assert box == (15, 17, 25, 37)
    # The water around it takes the scene's colour, and the ship changes with it.
    assert np.allclose(scene[18:36, 16:24], 170)
    assert np.allclose(scene[7:17], 50)
    assert np.allclose(scene[60:], 50)


def test_a_coast_and_clouds_say_where_they_are(real_scenes: Importer) -> None:
    water = real_scenes("water")
    scene = np.full((300, 400, 3), 50, np.float32)
    land = np.full((120, 90, 3), 150, np.float32)
    taken = water.add_coast(scene, land, np.random.default_rng(0))
    assert taken.shape == (300, 400, 1)
    assert np.array_equal(taken[..., 0] == 0, (scene == 50).all(2))
    assert taken[:, 0].min() == 1
    assert not taken[:, -100:].any()
    sky = np.full((200, 200, 3), 50, np.float32)
    cloud = np.full((60, 60, 3), 200, np.float32)
    alpha = water.add_cloud(sky, cloud, 70, 10)
    assert alpha[30, 30, 0] == 1
    assert np.allclose(sky[40, 100], 200)
    assert np.allclose(sky[:10], 50)
