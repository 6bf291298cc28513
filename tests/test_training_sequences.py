"""Training's sequences are those of the runtime's builder, with tokens' numbers for embeddings."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the `export` extra")

from tokenizers import Tokenizer

from lrs_edge.bundle.bundle import default_bundle_path
from tests.scripts import TRAIN, scripts

NAMES = ("common", "views", "questions", "sequences")


@pytest.fixture
def train() -> Iterator[dict[str, Any]]:
    """Modules of the training."""
    with scripts(TRAIN) as importer:
        yield {name: importer(name) for name in NAMES}


@pytest.mark.parametrize("note", [None, "ship 2 left top: top left"])
@pytest.mark.parametrize("seed", range(8))
def test_a_sequence_is_text_view_separator_rows_text(
    train: dict[str, Any], seed: int, note: str | None
) -> None:
    common, views, sequences = train["common"], train["views"], train["sequences"]
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(200, 3000, 2))
    level = common.pyramid(width, height).levels[-1]
    count = int(rng.integers(1, min(level.tile_count, 6) + 1))
    places = sorted(rng.choice(level.tile_count, count, replace=False))
    tiles = [divmod(int(place), level.tile_cols) for place in places]
    features = rng.integers(0, 255, (1 + count, common.TOKENS, 4), dtype=np.uint8)
    view = views.level_view(width, height, (level.height, level.width), tiles, features, [])
    kept = views.choose_kept(view, [], random.Random(seed))
    asked = train["questions"].PictureQuestion("How many ships?", "three", "count")
    tokenizer = Tokenizer.from_file(str(default_bundle_path() / "tokenizer.json"))
    made = sequences.Writer(tokenizer).write(
        view, kept, [asked], None if note is None else lambda _: note
    )

    before = tokenizer.encode("<|im_start|>user\n").ids
    wanted = [(sequences.TEXT, token) for token in before]
    wanted += [(place, 0) for place in range(common.TOKENS)]
    wanted += [(sequences.TEXT, token) for token in tokenizer.encode(":").ids]
    for row, line in zip(view.local, kept, strict=True):
        wanted += [(int(place), 0) for place in row[line]] + [(sequences.NEWLINE, 0)]
    image = len(wanted)
    text = "\nHow many ships?<|im_end|>\n<|im_start|>assistant\n"
    said = [] if note is None else [f"\nSeen: {note}"]
    for part in (*said, text, "three"):
        wanted += [(sequences.TEXT, token) for token in tokenizer.encode(part).ids]
    # Sources count the features that are used only.
    used = np.unique([source for source, _ in wanted if source >= 0])
    assert np.array_equal(made.features, view.features[used])
    sources = [source if source < 0 else int(used[source]) for source in made.source.tolist()]
    assert list(zip(sources, made.ids.tolist(), strict=True)) == wanted
    assert made.position.tolist() == list(range(len(wanted)))
    assert made.local == (len(before) + common.TOKENS + 1, image)


@pytest.mark.parametrize(
    ("note", "kind", "answer", "told"),
    [
        ("ship 3 left top: top left, center", "count", "3", " 3"),
        ("ship 3 left top: top left, center", "side", "left", " left"),
        ("ship 3 left top: top left, center", "where", "top left", " top left"),
        ("ship 12 right top: bottom", "where", "bottom", " bottom"),
        ("ship 12 right top: bottom", "side", "bottom", ""),
        ("perhaps ship 12 right top: bottom", "presence", "yes", "12"),
        ("no ship", "presence", "no", " no"),
        ("no ship", "presence", "yes", ""),
    ],
)
def test_attention_is_asked_for_where_the_answer_is_said(
    train: dict[str, Any], note: str, kind: str, answer: str, told: str
) -> None:
    tokenizer = Tokenizer.from_file(str(default_bundle_path() / "tokenizer.json"))
    writer = train["sequences"].Writer(tokenizer)
    question = train["questions"].PictureQuestion("Where are the ships?", answer, kind)
    ids = writer.said(note)
    assert (
        tokenizer.decode([ids[i] for i in writer.telling(note, question)]).strip() == told.strip()
    )
