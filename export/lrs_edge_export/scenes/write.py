"""A set of scenes in a folder: images, questions as JSONL, and the record of how all was made.

    OUT/image/scenes_00000.tif   GeoTIFF or COG
    OUT/questions.jsonl          one question per line, as LRS-VQA has them
    OUT/scenes.json              tiles, boxes and seeds of every scene

A run that was interrupted goes on where it stopped, and the same seed with a larger count adds
scenes. Files that such a run did not make are never replaced.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrs_edge import __version__
from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.files import replacing
from lrs_edge_export.scenes.geotiff import Encoding, invented_place, read_fingerprint, write_scene
from lrs_edge_export.scenes.library import LabelledTile, TileLibrary
from lrs_edge_export.scenes.plan import ScenePlan, plan_scene
from lrs_edge_export.scenes.questions import SceneQuestion, scene_questions
from lrs_edge_export.scenes.rules import DEFAULT_RULES, SceneRules
from lrs_edge_export.scenes.tiles import TileCache

IMAGES, QUESTIONS, RECORD = "image", "questions.jsonl", "scenes.json"
MAX_SCENES = 100_000
#: Counted up whenever the same plan gives other pixels.
_RENDERING = 1
_FORMAT = 1
_MAX_RECORD = 1 << 30


@dataclass(frozen=True)
class SceneSetOptions:
    """What to make.

    Attributes:
        count: How many scenes.
        sizes: (width, height) in pixels; scenes take them in turn.
        questions: How many questions on each scene, where it offers as many.
        seed: The same seed and tiles make the same scenes.
        name: Begins file names and question ids; LRS-VQA's scorer takes it for the data set.
        kinds: Kinds of questions; None for all.
        splits: Of the tiles, for the record; None when the library is not split.
        encoding: How images are stored.
    """

    count: int = 20
    sizes: tuple[tuple[int, int], ...] = ((8000, 8000),)
    questions: int = 8
    seed: int = 0
    name: str = "scenes"
    kinds: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None
    encoding: Encoding = field(default_factory=Encoding)


@dataclass(frozen=True)
class SceneSet:
    """What was made.

    Attributes:
        folder: Where it lies.
        scenes: How many scenes there are now.
        made: How many of them this run drew; the others were there already.
        questions: How many questions there are.
    """

    folder: Path
    scenes: int
    made: int
    questions: int


@dataclass(frozen=True)
class SceneProgress:
    """How far a run is.

    Attributes:
        scene: Number of the scene that is drawn, from 0.
        scenes: How many there will be.
        name: Its name.
        share: Finished part of it, 0 to 1.
    """

    scene: int
    scenes: int
    name: str
    share: float


def write_scenes(
    library: TileLibrary,
    folder: Path,
    options: SceneSetOptions,
    rules: SceneRules = DEFAULT_RULES,
    on_progress: Callable[[SceneProgress], None] | None = None,
) -> SceneSet:
    """Make a set of scenes, or finish one.

    Args:
        library: The tiles.
        folder: Where the set goes; created when it does not exist.
        options: What to make.
        rules: Which labels are backgrounds, and which do not go together.
        on_progress: Told after every row of blocks.

    Raises:
        UsageError: An option is out of range, or the folder holds files of something else.
        ImageError: A tile cannot be decoded.
        LrsEdgeError: A file cannot be written.
    """
    _check(options)
    settings = _settings(options, rules)
    _check_folder(folder, settings, options.count)
    plans = [_plan(library, options, rules, number) for number in range(options.count)]
    asked = [_ask(plan, options, rules) for plan in plans]
    marks = [_fingerprint(plan, library, options.encoding) for plan in plans]
    waiting = [
        number
        for number in range(options.count)
        if not _finished(folder, plans[number], marks[number])
    ]
    record = {
        "format": _FORMAT,
        "generator": f"lrs-edge {__version__}",
        "tiles": library.folder.name,
        "settings": settings,
        "scenes": [
            _scene_record(plan, library, mark) for plan, mark in zip(plans, marks, strict=True)
        ],
    }
    lines = [
        line
        for plan, questions in zip(plans, asked, strict=True)
        for line in question_lines(plan, questions)
    ]
    try:
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        # The record goes first: it says whose files these are when the run is interrupted.
        _write(folder / RECORD, json.dumps(record, indent=1) + "\n")
        cache = TileCache()
        for number in waiting:
            plan = plans[number]

            def on_block(share: float, number: int = number, name: str = plan.name) -> None:
                if on_progress is not None:
                    on_progress(SceneProgress(number, options.count, name, share))

            path = _image(folder, plan)
            write_scene(plan, path, options.encoding, marks[number], cache=cache, on_block=on_block)
        # And the questions last: they are there when every image is.
        _write(folder / QUESTIONS, "".join(f"{json.dumps(line)}\n" for line in lines))
    except OSError as error:
        place = error.filename or folder
        raise LrsEdgeError(
            f"{place} cannot be written ({error.strerror}); name another folder"
        ) from error
    return SceneSet(folder, options.count, len(waiting), len(lines))


def question_lines(plan: ScenePlan, questions: list[SceneQuestion]) -> list[dict[str, Any]]:
    """Questions as objects with the fields of LRS-VQA.

    `hbox` is [x0, y0, x1, y1] in pixels of the image for one evidence box, as there; a list of such
    boxes where the answer needs several; and [] where nothing is to be found.
    """
    lines = []
    for number, question in enumerate(questions):
        boxes = [list(box) for box in question.boxes]
        lines.append(
            {
                "question_id": f"{plan.name}_{number:02d}",
                "image": f"{IMAGES}/{plan.name}.tif",
                "category": question.category,
                "text": question.text,
                "ground_truth": question.answer,
                "hbox": boxes[0] if len(boxes) == 1 else boxes,
            }
        )
    return lines


def _check(options: SceneSetOptions) -> None:
    if not 1 <= options.count <= MAX_SCENES:
        raise UsageError(
            f"{options.count} scenes are out of range; choose a number from 1 to {MAX_SCENES}"
        )
    if options.questions < 1:
        raise UsageError(
            f"{options.questions} questions on each scene are too few; ask for at least one"
        )
    if not options.sizes:
        raise UsageError("no size of scenes is given; name at least one")
    if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", options.name):
        raise UsageError(f"name {options.name!r} must have 1 to 40 letters, digits and hyphens")
    if not 50 <= options.encoding.quality <= 100:
        raise UsageError(
            f"JPEG quality {options.encoding.quality} is out of range; choose one from 50 to 100"
        )


def _settings(options: SceneSetOptions, rules: SceneRules) -> dict[str, Any]:
    """Everything that two runs must have in common to go on with one another's files."""
    settings = asdict(options)
    del settings["count"]
    settings |= {"rural": rules.rural, "urban": rules.urban}
    # As JSON reads it back: tuples are lists.
    settings = json.loads(json.dumps(settings))
    return dict(settings)


def _check_folder(folder: Path, settings: dict[str, Any], count: int) -> None:
    """Refuse a folder with files of something else, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to write scenes into")
    record = folder / RECORD
    if not record.exists():
        for name in (IMAGES, QUESTIONS):
            if (folder / name).exists():
                raise UsageError(f"{folder / name} is not from this command; choose another folder")
        return
    try:
        if record.stat().st_size > _MAX_RECORD:
            raise ValueError
        found = json.loads(record.read_text(encoding="utf-8"))
        before, scenes = found["settings"], len(found["scenes"])
        ours = found["format"] == _FORMAT and isinstance(before, dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UsageError(f"{record} is not from this command; choose another folder")
    if other := sorted(key for key in {*settings, *before} if settings.get(key) != before.get(key)):
        raise UsageError(
            f"{folder} holds scenes made with other {', '.join(other)}; "
            "give the same options, or choose another folder"
        )
    if scenes > count:
        raise UsageError(f"{folder} holds {scenes} scenes already; ask for at least as many")


def _plan(
    library: TileLibrary, options: SceneSetOptions, rules: SceneRules, number: int
) -> ScenePlan:
    """Scene number so and so, whatever the count."""
    draw = random.Random(f"scene {options.seed}/{number}")  # noqa: S311 - nothing secret
    width, height = options.sizes[number % len(options.sizes)]
    return plan_scene(library, draw, width, height, f"{options.name}_{number:05d}", rules)


def _ask(plan: ScenePlan, options: SceneSetOptions, rules: SceneRules) -> list[SceneQuestion]:
    draw = random.Random(f"questions {options.seed}/{plan.name}")  # noqa: S311 - nothing secret
    return scene_questions(plan, draw, options.questions, options.kinds, rules)


def _image(folder: Path, plan: ScenePlan) -> Path:
    return folder / IMAGES / f"{plan.name}.tif"


def _finished(folder: Path, plan: ScenePlan, mark: str) -> bool:
    """Whether a scene's image is there already; another image in its place is refused."""
    path = _image(folder, plan)
    if not path.exists():
        return False
    if read_fingerprint(path) == mark:
        return True
    raise UsageError(
        f"{path} is not the image that this run would make; choose another folder, or delete it"
    )


def _tile(tile: LabelledTile, library: TileLibrary) -> str:
    return tile.path.relative_to(library.folder).as_posix()


def _scene_facts(plan: ScenePlan, library: TileLibrary) -> dict[str, Any]:
    """All that decides a scene's pixels and questions."""
    back = plan.background
    return {
        "name": plan.name,
        "width": plan.width,
        "height": plan.height,
        "setting": plan.setting,
        "background": {
            "labels": back.labels,
            "tiles": [_tile(tile, library) for tile in back.tiles],
            "enlarged": back.enlarged,
            "gains": back.gains,
            "seed": back.seed,
        },
        "places": [
            {"label": p.label, "tile": _tile(p.tile, library), "box": p.box, "turn": p.turn}
            for p in plan.placements
        ],
        "absent": plan.absent,
    }


def _scene_record(plan: ScenePlan, library: TileLibrary, mark: str) -> dict[str, Any]:
    place = asdict(invented_place(plan))
    return _scene_facts(plan, library) | {"invented_place": place, "fingerprint": mark}


def _fingerprint(plan: ScenePlan, library: TileLibrary, encoding: Encoding) -> str:
    made_of = [_RENDERING, _scene_facts(plan, library), asdict(encoding)]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with replacing(path) as stream:
        stream.write(text.encode())
