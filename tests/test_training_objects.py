"""What the detector is trained to say is what the runtime reads as the same boxes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the `export` extra")

from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.bundle.manifest import ObjectSpec
from lrs_edge.objects.detections import decode
from lrs_edge.pyramid.levels import Level, TileIndex
from tests.scripts import TRAIN, scripts


@pytest.fixture(scope="module")
def objects() -> Iterator[Any]:
    """The script that trains the detector."""
    with scripts(TRAIN) as importer:
        yield importer("objects")


def picture(label: str, *boxes: tuple[float, float, float, float]) -> dict[str, Any]:
    """A picture with boxes in shares."""
    return {"regions": [{"label": label, "box": list(box)} for box in boxes]}


@settings(deadline=None, max_examples=60)
@given(
    centre=st.tuples(st.floats(0.02, 0.98), st.floats(0.02, 0.98)),
    sides=st.tuples(st.floats(8, 350), st.floats(8, 350)),
)
def test_the_runtime_reads_the_box_that_was_written(
    objects: Any, centre: tuple[float, float], sides: tuple[float, float]
) -> None:
    level = Level(768, 1152, 2, 3, 384)
    x, y = centre[0] * level.width, centre[1] * level.height
    box = (
        (x - sides[0] / 2) / level.width,
        (y - sides[1] / 2) / level.height,
        (x + sides[0] / 2) / level.width,
        (y + sides[1] / 2) / level.height,
    )
    spec = ObjectSpec(objects.LABELS, objects.CELLS, ((0.3, 0.5),) * len(objects.LABELS))
    found = []
    for tile in level.tiles():
        size = (level.height, level.width)
        heat, centres, _ = objects.targets(picture("ship", box), size, tile.row, tile.col)
        maps = np.zeros((len(objects.LABELS) + 2, objects.CELLS, objects.CELLS), np.float32)
        maps[: len(objects.LABELS)] = heat * (heat == 1)
        for _, row, col, wide, high in centres:
            maps[-2:, row, col] = np.log2([wide, high])
        found.append(decode(maps, level, TileIndex(tile.row, tile.col), spec))
    assert [len(part.labels) for part in found].count(1) == 1
    (part,) = (part for part in found if len(part.labels))
    assert spec.labels[int(part.labels[0])] == "ship"
    # A centre is told to half a cell of 16 pixels.
    near = np.array([8.5 / level.width, 8.5 / level.height] * 2)
    assert (np.abs(part.boxes[0] - np.clip(box, 0, 1)) <= near).all()


def test_what_is_too_large_or_too_small_is_left_out(objects: Any) -> None:
    ship = objects.LABELS.index("ship")
    for box in ((0.1, 0.1, 0.9, 0.9), (0.25, 0.25, 0.252, 0.252)):
        heat, centres, unclear = objects.targets(picture("ship", box), (768, 768), 0, 0)
        assert not heat.any()
        assert centres == []
        assert unclear[ship].any()
        assert not np.delete(unclear, ship, 0).any()


def test_labels_are_said_once_and_aircraft_are_airplanes(objects: Any) -> None:
    assert len(set(objects.LABELS)) == len(objects.LABELS)
    assert objects.detected("airliner") == ("airplane",)
    assert objects.detected("van") == ("vehicle",)
    assert objects.detected("forest") == ()
