"""Scenes as numbers: the library, plans, and questions whose answers are counted again."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.objects.note import NINTHS
from lrs_edge_export.scenes.library import TileLibrary, read_library, spoken_name
from lrs_edge_export.scenes.plan import ScenePlan, gap, plan_scene
from lrs_edge_export.scenes.questions import (
    KINDS,
    SceneQuestion,
    every_text,
    ninth,
    scene_questions,
)
from lrs_edge_export.scenes.rules import DEFAULT_RULES, SceneRules
from lrs_edge_export.scenes.wording import article, fill, plural
from tests.scene_tiles import LABELS, make_tiles, picture, write_labels

SIDES = st.integers(1000, 16_000)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiles(tmp_path_factory.mktemp("tiles") / "set")


@pytest.fixture(scope="module")
def library(folder: Path) -> TileLibrary:
    return read_library(folder, None)


def plan(library: TileLibrary, seed: int, width: int = 4000, height: int = 4000) -> ScenePlan:
    return plan_scene(library, random.Random(seed), width, height, f"scene{seed}")


class TestLibrary:
    def test_it_has_every_tile_under_its_spoken_name(self, library: TileLibrary) -> None:
        assert library.labels == tuple(sorted(spoken_name(label) for label in LABELS))
        assert {len(tiles) for tiles in library.by_label.values()} == {6}

    def test_splits_and_accept_choose_tiles(self, folder: Path) -> None:
        train = read_library(folder, ["train"])
        assert all(
            "_0" in t.path.name or int(t.path.stem[-1]) % 2 == 0
            for ts in train.by_label.values()
            for t in ts
        )
        only = read_library(folder, ["test"], lambda facts: facts["scene"] == "Pond")
        assert only.labels == ("pond",)
        assert len(only.by_label["pond"]) == 3

    def test_an_unknown_split_names_those_there_are(self, folder: Path) -> None:
        with pytest.raises(UsageError, match=r"split val.*it has test, train"):
            read_library(folder, ["val"])

    def test_a_folder_without_labels_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"has no labels\.jsonl"):
            read_library(tmp_path, None)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"file": "../outside.png"}, "lies outside"),
            ({"file": "/etc/hostname"}, "lies outside"),
            ({"file": "images/link.png"}, "lies outside"),
            ({"file": "images/none.png"}, "does not exist"),
            ({"file": 7}, "'file' must be a path"),
            ({"file": "a\0b"}, "'file' must be a path"),
            ({"file": "a" * 3000}, "not a usable path|does not exist"),
            ({"file": "\ud800.png"}, "not a usable path"),
            ({"file": "images/circle.png"}, "not a usable path|does not exist"),
            ({"width": 100_000}, "'width' and 'height'"),
            ({"width": True}, "'width' and 'height'"),
            ({"height": "48"}, "'width' and 'height'"),
            ({"scene": ["Pond"]}, "'scene' must be a name"),
            ({"scene": ""}, "'scene' must be a name"),
            ({"scene": "{0.__class__}"}, "'scene' must be a name"),
            ({"scene": "x" * 65}, "'scene' must be a name"),
        ],
    )
    def test_hostile_lines_are_refused(
        self, tmp_path: Path, change: dict[str, object], said: str
    ) -> None:
        root = tmp_path / "set"
        (root / "images").mkdir(parents=True)
        picture(1).save(root / "images" / "a.png")
        picture(1).save(tmp_path / "outside.png")
        (root / "images" / "link.png").symlink_to(tmp_path / "outside.png")
        (root / "images" / "circle.png").symlink_to(root / "images" / "circle.png")
        line = {"file": "images/a.png", "width": 48, "height": 48, "scene": "Pond"}
        write_labels(root, [line, line | change])
        with pytest.raises(LrsEdgeError, match=said) as raised:
            read_library(root, None)
        assert "line 2" in str(raised.value)

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "3", "x" * ((1 << 20) + 5)])
    def test_lines_that_are_no_objects_are_refused(self, tmp_path: Path, text: str) -> None:
        write_labels(tmp_path, [text])
        with pytest.raises(LrsEdgeError, match="line 1"):
            read_library(tmp_path, None)

    @pytest.mark.parametrize(
        ("label", "name"),
        [
            ("BaseballField", "baseball field"),
            ("DenseResidential", "dense residential area"),
            ("harbor_dock-yard", "harbor dock yard"),
            ("swimming pool", "swimming pool"),
        ],
    )
    def test_spoken_names(self, label: str, name: str) -> None:
        assert spoken_name(label) == name


class TestPlan:
    @quick
    @given(seed=st.integers(0, 1 << 30), width=SIDES, height=SIDES)
    def test_places_lie_apart_within_the_scene(
        self, library: TileLibrary, seed: int, width: int, height: int
    ) -> None:
        made = plan(library, seed, width, height)
        assert 1 <= len(made.placements) <= 12
        boxes = [placement.box for placement in made.placements]
        for x0, y0, x1, y1 in boxes:
            assert 0 < x0 < x1 < width
            assert 0 < y0 < y1 < height
            assert min(x1 - x0, y1 - y0) >= 150
            assert max(x1 - x0, y1 - y0) <= 1.2 * 900
            assert 0.6 < (x1 - x0) / (y1 - y0) < 1.7
        for i, box in enumerate(boxes):
            assert all(gap(box, other) >= 4 for other in boxes[:i])

    @quick
    @given(seed=st.integers(0, 1 << 30))
    def test_labels_go_together(self, library: TileLibrary, seed: int) -> None:
        made = plan(library, seed)
        placed = {placement.label for placement in made.placements}
        back = set(made.background.labels)
        groups = DEFAULT_RULES.rural if made.setting == "rural" else DEFAULT_RULES.urban
        assert any(back <= set(group) for group in groups)
        assert {tile.label for tile in made.background.tiles} == back
        shown = DEFAULT_RULES.hidden_by(back) | DEFAULT_RULES.hidden_by(placed)
        assert not back & placed
        assert not set(made.absent) & shown
        assert not placed & DEFAULT_RULES.hidden_by(back)
        assert all(placement.tile.label == placement.label for placement in made.placements)

    def test_the_same_seed_makes_the_same_plan(self, library: TileLibrary) -> None:
        assert plan(library, 5) == plan(library, 5)
        assert plan(library, 5) != plan(library, 6)

    def test_plans_vary(self, library: TileLibrary) -> None:
        made = [plan(library, seed) for seed in range(200)]
        most = Counter(
            max(Counter(p.label for p in m.placements).values()) for m in made if m.placements
        )
        assert set(most) == {1, 2, 3, 4, 5}
        assert {m.setting for m in made} == {"rural", "urban"}
        pairs = sum(
            any(
                gap(a.box, b.box) <= 28
                for i, a in enumerate(m.placements)
                for b in m.placements[:i]
            )
            for m in made
        )
        assert 60 < pairs < 200

    def test_no_picture_occurs_twice(self, library: TileLibrary) -> None:
        for seed in range(50):
            tiles = [placement.tile for placement in plan(library, seed).placements]
            assert len(tiles) == len(set(tiles))

    @pytest.mark.parametrize(("width", "height"), [(999, 4000), (4000, 40_001), (0, 0)])
    def test_sizes_out_of_range_are_refused(
        self, library: TileLibrary, width: int, height: int
    ) -> None:
        with pytest.raises(UsageError, match="out of range"):
            plan(library, 0, width, height)

    def test_a_library_without_backgrounds_says_how_to_name_them(self, folder: Path) -> None:
        few = read_library(folder, None, lambda facts: facts["scene"] in ("Pond", "Airport"))
        with pytest.raises(UsageError, match=r"--rural.*airport, pond"):
            plan(few, 0)
        rules = SceneRules(rural=(("pond",),), urban=())
        with pytest.raises(UsageError, match="fewer than two labels"):
            plan_scene(few, random.Random(0), 2000, 2000, "x", rules)


class TestQuestions:
    @quick
    @given(seed=st.integers(0, 1 << 30), width=SIDES, height=SIDES)
    def test_answers_follow_from_the_plan(
        self, library: TileLibrary, seed: int, width: int, height: int
    ) -> None:
        made = plan(library, seed, width, height)
        names = {plural(label): label for label in library.labels}
        names |= {label: label for label in library.labels}
        asked = scene_questions(made, random.Random(seed), 40)
        assert asked
        for question in asked:
            focus = question.focus.lower()
            assert question.focus in question.text
            assert set(question.boxes) <= {placement.box for placement in made.placements}
            check = getattr(self, f"check_{question.category.split('/')[0]}")
            check(made, question, names.get(focus, focus))

    def check_presence(self, made: ScenePlan, question: SceneQuestion, label: str) -> None:
        held = [p.box for p in made.placements if p.label == label]
        assert question.answer == ("yes" if held else "no")
        assert sorted(question.boxes) == sorted(held)
        assert label not in made.background.labels

    def check_count(self, made: ScenePlan, question: SceneQuestion, label: str) -> None:
        held = [p.box for p in made.placements if p.label == label]
        assert question.answer == str(len(held))
        assert sorted(question.boxes) == sorted(held)
        assert label not in DEFAULT_RULES.uncounted

    def check_category(self, made: ScenePlan, question: SceneQuestion, where: str) -> None:
        row, column = next(
            (r, c)
            for r, names in enumerate(NINTHS)
            for c, name in enumerate(names)
            if name == where
        )
        inside = []
        for p in made.placements:
            x, y = p.center
            if int(3 * x / made.width) == column and int(3 * y / made.height) == row:
                inside.append(p)
        assert [(p.label, p.box) for p in inside] == [(question.answer, question.boxes[0])]

    def check_position(self, made: ScenePlan, question: SceneQuestion, label: str) -> None:
        (held,) = [p for p in made.placements if p.label == label]
        x, y = held.center
        assert question.answer == NINTHS[int(3 * y / made.height)][int(3 * x / made.width)]
        assert question.boxes == (held.box,)

    def check_rural(self, made: ScenePlan, question: SceneQuestion, focus: str) -> None:
        assert (question.answer, question.boxes, focus) == (made.setting, (), "")

    def check_beside(self, made: ScenePlan, question: SceneQuestion, label: str) -> None:
        (held,) = [p for p in made.placements if p.label == label]
        others = [p for p in made.placements if p is not held]
        nearest = min(others, key=lambda p: gap(held.box, p.box))
        assert question.answer == nearest.label
        assert question.boxes == (held.box, nearest.box)
        rest = [gap(held.box, p.box) for p in others if p.label != nearest.label]
        assert all(distance >= 100 for distance in rest)

    @quick
    @given(seed=st.integers(0, 1 << 30))
    def test_nothing_is_asked_twice(self, library: TileLibrary, seed: int) -> None:
        asked = scene_questions(plan(library, seed), random.Random(seed), 60)
        same = Counter((q.category, plural(q.focus.lower()) if q.focus else "") for q in asked)
        assert max(same.values()) == 1

    def test_answers_are_balanced(self, library: TileLibrary) -> None:
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for seed in range(500):
            draw = random.Random(seed)
            for question in scene_questions(plan(library, seed), draw, 8):
                answers[question.category][question.answer] += 1
        assert set(answers) == set(KINDS)
        yes, no = answers["presence"]["yes"], answers["presence"]["no"]
        assert 0.42 < yes / (yes + no) < 0.58
        counts = answers["count"]
        assert set(counts) == set("012345")
        assert max(counts.values()) < 0.32 * counts.total()
        settings_ = answers["rural/urban classification"]
        assert 0.4 < settings_["rural"] / settings_.total() < 0.6
        assert set(answers["position"]) == {name for row in NINTHS for name in row}
        assert max(answers["position"].values()) < 0.2 * answers["position"].total()

    def test_labels_are_asked_about_when_they_are_absent_too(self, library: TileLibrary) -> None:
        told: dict[str, Counter[str]] = defaultdict(Counter)
        for seed in range(400):
            made = plan(library, seed)
            for question in scene_questions(made, random.Random(seed), 8, ["presence"]):
                told[question.focus.lower()][question.answer] += 1
        often = {label: seen for label, seen in told.items() if seen.total() >= 80}
        assert len(often) > 5
        for label, seen in often.items():
            assert 0.2 < seen["yes"] / seen.total() < 0.8, label

    def test_only_the_kinds_asked_for(self, library: TileLibrary) -> None:
        asked = scene_questions(plan(library, 3), random.Random(0), 9, ["position", "count"])
        assert {question.category for question in asked} <= {"position", "count"}
        with pytest.raises(UsageError, match="colour: not a kind of question"):
            scene_questions(plan(library, 3), random.Random(0), 9, ["colour"])

    def test_wordings_are_many(self, library: TileLibrary) -> None:
        texts: dict[str, set[str]] = defaultdict(set)
        for seed in range(300):
            for q in scene_questions(plan(library, seed), random.Random(seed), 8):
                texts[q.category].add(
                    q.text.lower().replace(q.focus.lower() or "?", "*").strip(".?! ")
                )
        assert all(len(found) >= 10 for found in texts.values())

    def test_every_text_spells_what_is_asked(self, library: TileLibrary) -> None:
        known = {
            word
            for text in every_text(library.labels)
            for word in re.findall(r"[a-z']+|\d", text.lower())
        }
        for seed in range(60):
            for question in scene_questions(plan(library, seed), random.Random(seed), 20):
                words = re.findall(r"[a-z']+|\d", f"{question.text} {question.answer}".lower())
                assert set(words) <= known

    def test_nothing_clear_is_said_near_the_lines_between_ninths(
        self, library: TileLibrary
    ) -> None:
        made = plan(library, 0, 3000, 3000)
        assert ninth(made, (1010, 1500)) is None
        assert ninth(made, (900, 1500)) == "left"
        assert ninth(made, (2999, 2999)) == "bottom right"


class TestWording:
    @pytest.mark.parametrize(
        ("name", "many"),
        [
            ("church", "churches"),
            ("bare land", "bare land"),
            ("storage tanks", "storage tanks"),
            ("railway station", "railway stations"),
            ("factory", "factories"),
            ("highway", "highways"),
            ("overpass", "overpasses"),
            ("island", "islands"),
        ],
    )
    def test_plurals(self, name: str, many: str) -> None:
        assert plural(name) == many

    def test_articles_and_verbs_agree(self) -> None:
        asks = "{Is} there {a}{focus}?"
        assert fill(asks, "airport") == "Is there an airport?"
        assert fill(asks, "church") == "Is there a church?"
        assert fill(asks, "storage tanks") == "Are there storage tanks?"
        assert fill(asks, "farmland") == "Is there farmland?"
        assert article("bare land") == ""
