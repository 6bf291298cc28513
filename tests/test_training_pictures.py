"""Training pictures and token labels: boxes follow their pictures, edges are neither, killed runs
go on."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.scripts import TRAIN, scripts

NAMES = ("drawing", "real_pictures", "token_labels", "words", "run", "common")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """Modules of the training."""
    with scripts(TRAIN) as importer:
        yield SimpleNamespace(**{name: importer(name) for name in NAMES})


@given(
    turn=st.integers(0, 7),
    x=st.integers(0, 50),
    y=st.integers(0, 30),
    w=st.integers(1, 13),
    h=st.integers(1, 9),
)
def test_a_box_follows_its_turned_picture(
    modules: Any, turn: int, x: int, y: int, w: int, h: int
) -> None:
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[y : y + h, x : x + w] = 255
    turned = np.asarray(modules.drawing.turned_image(Image.fromarray(pixels), turn))
    rows, cols = np.nonzero(turned[:, :, 0])
    box = modules.real_pictures.turned_box([x / 64, y / 40, (x + w) / 64, (y + h) / 40], turn)
    height, width = turned.shape[:2]
    found = [cols.min() / width, rows.min() / height]
    found += [(cols.max() + 1) / width, (rows.max() + 1) / height]
    assert box == pytest.approx(found)


def picture(**more: Any) -> dict[str, Any]:
    """A picture of one tile with a ship over two tokens and a bit of a third."""
    box = [64 / 384, 32 / 384, (128 + 6) / 384, 64 / 384]
    found = {"kind": "boxed", "source": "vhr10_rgb", "complete": ["ship", "bridge"]}
    found |= {"places": [], "absent_places": [], "regions": [{"label": "ship", "box": box}]}
    return {**found, **more}


def test_tokens_under_a_box_show_its_word_and_its_edge_is_neither(modules: Any) -> None:
    labels, words = modules.token_labels, modules.words.WORDS
    shown, known = labels.tile_labels(picture(), *labels.spans((384, 384), 0, 0))
    ship, bridge, vehicle = (words.index(w) for w in ("ship", "bridge", "vehicle"))
    assert np.argwhere(shown[:, :, ship]).tolist() == [[1, 2], [1, 3]]
    assert known[1, 4, ship] == labels.UNKNOWN
    assert known[5, 5, ship] == labels.KNOWN
    assert not shown[:, :, bridge].any()
    assert (known[:, :, bridge] == labels.KNOWN).all()
    assert (known[:, :, vehicle] == labels.UNKNOWN).all()


def test_what_lies_beyond_the_picture_is_unknown(modules: Any) -> None:
    labels = modules.token_labels
    _, known = labels.tile_labels(picture(), *labels.spans((192, 384), 0, 0))
    assert known[:6].any()
    assert not known[6:].any()


def test_incomplete_boxes_make_absence_doubtful_only(modules: Any) -> None:
    labels, words = modules.token_labels, modules.words.WORDS
    about = picture(complete=[], source="simd552_640")
    _, known = labels.tile_labels(about, *labels.spans((384, 384), 0, 0))
    assert known[8, 8, words.index("ship")] == labels.DOUBTFUL
    assert known[8, 8, words.index("bridge")] == labels.UNKNOWN


def test_vehicles_of_vhr10_are_complete_only_where_some_are_boxed(modules: Any) -> None:
    complete = modules.words.complete_of
    assert "vehicle" not in complete("vhr10_rgb", [], {"ship"})
    assert "vehicle" in complete("vhr10_rgb", [], {"vehicle"})
    assert complete("airport_338", [], {"airplane"}) == ["airplane"]
    assert complete("simd552_640", [], {"car"}) == []


def test_a_run_goes_on_after_the_slice_and_repeats_nothing(modules: Any, tmp_path: Path) -> None:
    paths = modules.common.Paths(tmp_path, tmp_path)
    once = [sys.executable, "-c", f"open({str(tmp_path / 'log')!r}, 'a').write('x')"]
    runner = modules.run.Runner(paths, None)
    runner.step("first", once)
    ended = modules.run.Runner(paths, 0.001)
    ended.step("first", once)
    with pytest.raises(modules.run.SliceEndedError):
        ended.step("second", [sys.executable, "-c", "import threading; threading.Event().wait()"])
    assert set(json.loads((tmp_path / "run.json").read_text())) == {"first"}
    last = modules.run.Runner(paths, None)
    last.step("first", once)
    last.step("second", once)
    assert (tmp_path / "log").read_text() == "xx"
