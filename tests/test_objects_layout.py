"""The prompt's part for objects, and what a manifest may say of a detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lrs_edge.bundle.bundle import read_manifest
from lrs_edge.bundle.layout import LocalRows, Objects, Part, PromptSpec, problems, rows_layout
from lrs_edge.errors import BundleError
from lrs_edge.language.kv_cache import TokenKind
from lrs_edge.pyramid.levels import TokenGrid
from tests.sequences import builder
from tests.test_bundle import change, write_bundle

SEEN = "\nSeen: {objects}"
PARTS = rows_layout("ab", "{question}", separator_id=58, objects=SEEN)
SPEC: dict[str, Any] = {
    "labels": ["airplane", "ship"],
    "grid": 24,
    "thresholds": [[0.2, 0.5], [0, 1]],
}


def test_the_part_stands_between_local_tokens_and_question() -> None:
    assert [type(part).__name__ for part in PARTS[-3:]] == ["LocalRows", "Objects", "Question"]
    assert problems(PARTS) == ""
    assert PromptSpec(PARTS, ()).objects == Objects(SEEN)
    without = rows_layout("ab", "{question}", separator_id=58)
    assert PromptSpec(without, ()).objects is None
    assert without == tuple(part for part in PARTS if not isinstance(part, Objects))
    encoded = msgspec.json.encode(PARTS)
    assert msgspec.json.decode(encoded, type=tuple[Part, ...]) == PARTS


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ((*PARTS, Objects(SEEN)), "right after its local tokens"),
        ((PARTS[0], Objects(SEEN), *PARTS[1:]), "right after its local tokens"),
        ((*PARTS[:-1], Objects(SEEN), PARTS[-1]), "right after its local tokens"),
        ((*PARTS[:-2], Objects("\nSeen"), PARTS[-1]), "once in the text of its objects"),
        ((*PARTS[:-2], Objects("{objects} {objects}"), PARTS[-1]), "once in the text of its"),
        ((*PARTS[:-2], Objects("{objects} {question}"), PARTS[-1]), "in its question only"),
    ],
)
def test_other_places_and_texts_are_refused(parts: tuple[Part, ...], problem: str) -> None:
    assert problem in problems(parts)


def test_the_final_sequence_has_the_note_and_a_level_has_not() -> None:
    sequences = builder(PARTS, np.full(2, -1, np.float32))
    prompt = sequences.prompt
    assert not len(builder(PARTS[:-2] + PARTS[-1:], np.zeros(2, np.float32)).prompt.note("x"))
    assert prompt.decode(prompt.note("ship 2").tolist()) == "\nSeen: ship 2"
    after = sequences.text(prompt.tokens("Why?").after)
    assert len(after) == 4
    note = sequences.text(prompt.note("ship 2"))
    prefix = sequences.prefix(np.zeros((4, 2), np.float32))
    grid = TokenGrid(2, 2, 2, 1, 1)
    local = sequences.local(grid, {}, 0)
    final = sequences.final(prefix, local, after, note)
    spoken = final.embeds[final.tokens["kind"] == TokenKind.QUESTION][:, 0].astype(np.int64)
    assert prompt.decode(spoken.tolist()) == "\nSeen: ship 2Why?"
    assert np.array_equal(final.tokens["position"], np.arange(len(final)))
    assert len(final) == len(prefix) + len(local) + len(note) + len(after)
    assert len(sequences.level(prefix, local, after)) == len(final) - len(note)
    plain = sequences.final(prefix, local, after)
    assert len(plain) == len(final) - len(note)


def described(folder: Path, spec: dict[str, Any] | None, *, part: bool) -> Path:
    """A bundle whose manifest has this `vision.objects` and such a part, or neither."""
    bundle = write_bundle(folder / "bundle")
    content = json.loads((bundle / "manifest.json").read_text())
    parts = msgspec.to_builtins(
        rows_layout("a", "{question}", separator_id=3, objects=SEEN if part else None)
    )
    change(
        bundle,
        vision=content["vision"] | {"objects": spec},
        prompt=content["prompt"] | {"parts": parts},
    )
    return bundle


def test_a_manifest_with_a_detector_is_read(tmp_path: Path) -> None:
    manifest = read_manifest(described(tmp_path, SPEC, part=True))
    assert manifest.vision.objects is not None
    assert manifest.vision.objects.labels == ("airplane", "ship")
    assert isinstance(manifest.prompt.local, LocalRows)


@pytest.mark.parametrize(
    ("spec", "part"), [(SPEC, False), (None, True)], ids=["without the part", "without detector"]
)
def test_detector_and_part_need_each_other(
    tmp_path: Path, spec: dict[str, Any] | None, *, part: bool
) -> None:
    with pytest.raises(BundleError, match=r"vision\.objects and an objects part"):
        read_manifest(described(tmp_path, spec, part=part))


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": []},
        {"labels": ["airplane", "airplane"]},
        {"labels": ["airplane", "x" * 65]},
        {"labels": ["airplane", "a\nb"]},
        {"labels": ["airplane", " ship"]},
        {"grid": 0},
        {"grid": 1 << 20},
        {"thresholds": [[0.2, 0.5]]},
        {"thresholds": [[0.2, 0.5], [0.5, 0.2]]},
        {"thresholds": [[0.2, 0.5], [0, 1.5]]},
    ],
)
def test_a_detector_that_cannot_be_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"vision\.objects"):
        read_manifest(described(tmp_path, SPEC | wrong, part=True))
