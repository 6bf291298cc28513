"""Answers as JSON, GeoJSON and text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from lrs_edge.answer import report
from lrs_edge.answer.answer import Answer, LevelReport, Region, Timings, TokenCounts
from lrs_edge.errors import UsageError

DOCS = Path(__file__).resolve().parent.parent / "docs"
SQUARE = ((10.0, 50.0), (10.0, 49.0), (11.0, 49.0), (11.0, 50.0), (10.0, 50.0))
PLACE = {
    "polygon": SQUARE,
    "polygon_wgs84": SQUARE,
    "geometry_wgs84": ((SQUARE,),),
    "centre_wgs84": (10.5, 49.5),
}
PLACELESS = report.ImageFacts("image.tif", 2000, 1000)
PLACED = report.ImageFacts("image.tif", 2000, 1000, "EPSG:32632", 0.5)


def make_region(**changes: object) -> Region:
    region = Region(1, 0, 2, (0.0, 0.0, 336.0, 336.0), (28.0, 0.0, 56.0, 28.0), 0.25, True, 12)
    return replace(region, **changes)


def make_answer(*regions: Region, **changes: object) -> Answer:
    answer = Answer(
        text="a port",
        question="What is this?",
        finish_reason="stop",
        search_end="finest_level",
        regions=regions or (make_region(), make_region(level=0, kept=False, tokens_kept=0)),
        levels=(LevelReport(0, 504, 1008, 2, 3, 6, 0, 864, 216),),
        tokens=TokenCounts(1440, 864, 900, 800, 30, 0, 3),
        timings=Timings(0.1, 0.2, 0.3, 0.4, 0.5, 1.6),
        peak_memory=300_000_000,
        warnings=("the search ended early",),
        token_ids=(1, 2, 3),
        model="nano",
        policy="full",
        image_size=(2000, 1000),
    )
    return replace(answer, **changes)


def test_json_is_one_line_that_the_record_reads_back() -> None:
    text = report.to_json(make_answer(), PLACED)
    assert text.count("\n") == 1
    record = msgspec.json.decode(text, type=report.AnswerRecord)
    assert record == report.record(make_answer(), PLACED)
    assert json.loads(text)["schema"] == "lrs-edge/answer"


def test_json_satisfies_the_documented_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((DOCS / "answer.schema.json").read_text())
    placed = make_answer(make_region(**PLACE))
    for answer, image in ((make_answer(), PLACELESS), (placed, PLACED)):
        jsonschema.validate(json.loads(report.to_json(answer, image)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"schema": "lrs-edge/answer"}, schema)


def test_every_field_of_the_json_is_documented() -> None:
    page = (DOCS / "answer.md").read_text()
    answer = json.loads(report.to_json(make_answer(), PLACED))
    names = [*answer, *answer["regions"][0], *answer["tokens"], *answer["timings"]]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_geojson_has_regions_as_features_and_the_answer_as_members() -> None:
    region = make_region(**PLACE)
    collection = json.loads(report.to_geojson(make_answer(region), PLACED))
    assert collection["type"] == "FeatureCollection"
    assert "crs" not in collection
    assert collection["answer"] == "a port"
    assert "regions" not in collection
    (feature,) = collection["features"]
    assert feature["id"] == "1/0/2"
    assert feature["geometry"]["coordinates"][0] == [list(point) for point in SQUARE]
    assert feature["properties"]["score"] == 0.25
    assert "polygon" not in feature["properties"]


def test_geojson_of_an_image_without_a_place_is_refused() -> None:
    with pytest.raises(UsageError, match="not georeferenced"):
        report.to_geojson(make_answer(), PLACELESS)


def test_regions_without_a_place_are_no_features() -> None:
    unplaced = make_region(row=1, polygon=SQUARE)
    collection = json.loads(report.to_geojson(make_answer(make_region(**PLACE), unplaced), PLACED))
    assert [feature["id"] for feature in collection["features"]] == ["1/0/2"]
    # The answer of a run is never lost to missing places.
    assert json.loads(report.to_geojson(make_answer(unplaced), PLACED))["features"] == []


def test_several_parts_are_a_multipolygon() -> None:
    east = tuple((x - 100, y) for x, y in SQUARE)
    shape = msgspec.to_builtins(report.geometry(((SQUARE,), (east,))))
    assert shape["type"] == "MultiPolygon"
    assert shape["coordinates"] == ((SQUARE,), (east,))


def test_evidence_lists_kept_regions_counts_and_warnings() -> None:
    region = make_region(**PLACE)
    text = report.evidence(make_answer(region, make_region(kept=False)))
    assert "level 1" in text
    assert "49.500000, 10.500000 (lat, lon)" in text
    assert text.count("kept") == 1
    assert "Warning: the search ended early" in text
    assert "1.60 s" in text


def test_evidence_of_a_region_without_an_outline_has_its_centre() -> None:
    text = report.evidence(make_answer(make_region(polygon=SQUARE, centre_wgs84=(-180.0, 0.5))))
    assert "0.500000, -180.000000" in text
