"""The manifest of the training data says what the data and the training code say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import TRAIN, Importer, scripts

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
MANIFEST = json.loads((TRAIN / "data.json").read_text(encoding="utf-8"))
SOURCES = {source["name"]: source for source in MANIFEST["sources"]}

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the training data is not here")


@pytest.fixture
def train() -> Iterator[Importer]:
    """Imports modules of the training."""
    with scripts(TRAIN) as importer:
        yield importer


def rows(name: str) -> list[dict[str, Any]]:
    lines = (DATA / name / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", SOURCES)
def test_every_image_is_used_or_held_out(name: str) -> None:
    source = SOURCES[name]
    parts = [*source["used"].values(), *source["held_out"].values()]
    assert sum(parts) == sum(source["images"].values())
    assert {"origin", "licence", "trusted", "left_out"} <= source.keys()
    assert {"presence", "absence", "count"} <= source["trusted"].keys()


def test_nothing_for_evaluation_alone_is_trained_on() -> None:
    left_out = {source["name"]: source for source in MANIFEST["not_used"]}
    assert "NC" in left_out["real_eval"]["licence"]
    assert not left_out.keys() & SOURCES.keys()
    assert not any("NC" in source["licence"] for source in SOURCES.values())
    assert all(source["why"] for source in left_out.values())


@needs_data
@pytest.mark.parametrize("name", SOURCES)
def test_images_and_boxes_are_those_of_the_data(name: str) -> None:
    source, found = SOURCES[name], rows(name)
    assert Counter(row["split"] for row in found) == source["images"]
    train_rows = [row for row in found if row["split"] == "train"]
    boxes = Counter(o["class"] for row in train_rows for o in row.get("objects", ()))
    assert boxes == {k: v["boxes"] for k, v in source.get("train_boxes", {}).items()}
    if "scenes" in source:
        scenes = source["scenes"]["used"] + source["scenes"]["held_out"]
        assert sorted(scenes) == sorted(Path(row["file"]).stem for row in found)


@needs_data
def test_the_development_scenes_are_those_of_the_training_code(train: Importer) -> None:
    is_dev = train("common").is_dev
    dev = Counter(is_dev(r["file"]) for r in rows("aid150_rsicd") if r["split"] == "train")
    source = SOURCES["aid150_rsicd"]
    held_out = source["held_out"]["development, every 18th of train"]
    assert dev == {False: source["used"]["train"], True: held_out}


def test_scenes_kept_apart_are_those_of_the_training_code(train: Importer) -> None:
    real_pictures = train("real_pictures")
    dubai = SOURCES["dubai_cc0"]
    assert sorted(real_pictures.DUBAI_TRAIN) == dubai["scenes"]["used"]
    absent = {name: sorted(some) for name, some in dubai["absent_by_eye"].items()}
    assert {name: sorted(some) for name, some in real_pictures.DUBAI_ABSENT.items()} == absent


@needs_data
@pytest.mark.parametrize("name", ["vhr10_rgb", "airport_338", "simd552_640", "open_objects"])
def test_what_training_takes_for_complete_is_trusted(train: Importer, name: str) -> None:
    complete_of = train("words").complete_of
    trusted = SOURCES[name]["trusted"]
    for row in rows(name):
        held = {o["class"] for o in row["objects"]}
        complete = set(complete_of(name, row.get("labelled_classes", []), held))
        assert complete <= {*trusted["absence"], *trusted.get("complete_where_boxed", ())}
        assert not complete & set(trusted.get("complete_where_boxed", ())) - held
