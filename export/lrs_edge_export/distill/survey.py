"""`lrs-edge distill --measure`: which layer of a language model knows where to look; no training.

For checkpoints that are exported with `--rfm from-llm:LAYERS`. Every layer is measured twice: by
its attention under the question, and by that divided by its attention under a generic instruction
(`lrs_edge.search.rfm.relative_logits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lrs_edge.engines.cores import thread_count
from lrs_edge.errors import UsageError
from lrs_edge_export.checkpoints.checkpoint import file_sha256, find_checkpoint, source_hash
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.collect import Collector, OnProgress
from lrs_edge_export.distill.features import open_encoder
from lrs_edge_export.distill.localise import LOCALISE_QUESTIONS, Row, measure_layers
from lrs_edge_export.distill.options import DistillOptions, torch_device
from lrs_edge_export.distill.questions import (
    TrainingQuestion,
    image_folder,
    question_files,
    read_questions,
)
from lrs_edge_export.distill.sequences import Assembler, by_image
from lrs_edge_export.distill.work import Work
from lrs_edge_export.families.recipes import resolve
from lrs_edge_export.families.registry import find_family, read_model
from lrs_edge_export.families.scoring import GENERIC


@dataclass(frozen=True)
class Survey:
    """Where every layer of a language model looks.

    Attributes:
        plain: One row for each layer, by attention.
        relative: The same by attention divided by that under `generic`.
        generic: The instruction.
        default: Layers of `--rfm from-llm` for this family.
        source: Where that number is from.
    """

    plain: tuple[Row, ...]
    relative: tuple[Row, ...]
    generic: str
    default: int
    source: str

    @property
    def best(self) -> tuple[int, bool]:
        """The layer of highest recall that can score, and whether relative scores are its best."""
        found = [
            (row.recall, row.mass, -layer, not relative)
            for relative, rows in ((False, self.plain), (True, self.relative))
            for layer, row in enumerate(rows)
            if layer > 0
        ]
        _, _, layer, plain = max(found)
        return -layer, not plain

    @property
    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        layer, relative = self.best
        return asdict(self) | {"best": {"layers": layer, "relative": relative}}


def survey_layers(
    checkpoint: str,
    data: Path,
    options: DistillOptions | None = None,
    generic: str = GENERIC,
    progress: OnProgress = lambda _: None,
) -> Survey:
    """Measure all layers of a checkpoint's language model on questions with boxes.

    Args:
        checkpoint: Local folder, name of a recipe, or hub name; it is only read.
        data: Folder with question files of LRS-VQA's form, or one such file.
        options: Those of what is measured and where; the others are not looked at. Without `work`,
            nothing is kept.
        generic: The instruction that relative scores are relative to.
        progress: Called with one line per step.

    Raises:
        ExportError: The checkpoint is not usable.
        UsageError: Options or data are not valid.
        ImageError: An image cannot be read.
        BackendError: A device is not there.
    """
    options = options or DistillOptions()
    device = torch_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(thread_count(options.threads) or 1)
    files = question_files(data)
    questions = read_questions(files)
    images = image_folder(data, options.images, questions)
    chosen = _boxed(questions, options)
    name, recipe = resolve(checkpoint)
    found = find_checkpoint(name, find_family, progress)
    progress(f"reading {found.path}")
    model = read_model(found, options.vision_tower or (recipe.vision_tower if recipe else None))
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(TemporaryDirectory()))
        work = Work(folder, _stamp(model, files, options, generic))
        encoder, _ = open_encoder(model, work.path, options.threads)
        assembler = Assembler(model, encoder, questions, images, work.path, generic)
        collector = Collector(assembler, questions, options.sampling)
        plain, relative = measure_layers(collector, chosen, model.llm, device, progress)
    if not any(row.questions for row in plain):
        raise UsageError("no question's evidence (hbox) lies in view on any level; check the boxes")
    scoring = find_family(found).scoring
    default, source = scoring.before(model.llm.config.layers), scoring.source
    if recipe is not None and recipe.rfm_layers:
        default, source = recipe.rfm_layers, recipe.rfm_source
    return Survey(tuple(plain), tuple(relative), generic, default, source)


def _boxed(questions: Sequence[TrainingQuestion], options: DistillOptions) -> dict[str, list[int]]:
    """Questions with boxes by image, as many as are asked for, images in an order by chance."""
    boxed = [number for number, question in enumerate(questions) if question.boxes]
    if not boxed:
        raise UsageError(
            "no question has an evidence box (hbox), so that nothing can be measured; "
            "`lrs-edge scenes` makes questions that have"
        )
    images = by_image(questions, boxed)
    names = sorted(images)
    left = LOCALISE_QUESTIONS if options.limit is None else options.limit
    chosen: dict[str, list[int]] = {}
    for place in seeded(options.sampling.seed, "images").permutation(len(names)):
        name = names[int(place)]
        if left > 0:
            chosen[name] = images[name][:left]
            left -= len(chosen[name])
    return chosen


def _stamp(
    model: Model, files: Sequence[Path], options: DistillOptions, generic: str
) -> dict[str, Any]:
    return {
        "checkpoint": source_hash(model.folders),
        "data": [file_sha256(path) for path in files],
        "measured": generic,
        "tiles per level": options.sampling.tiles,
        "seed": options.sampling.seed,
        "limit": options.limit,
    }


def survey_table(survey: Survey) -> str:
    """The survey as text: a line for each layer, the best one marked."""
    layer, relative = survey.best
    lines = [
        "                    evidence  attention under the question    divided by the generic one",
        "  layer  questions  share     mass   top 25 %  best token     mass   top 25 %  best token",
    ]
    for number, (plain, other) in enumerate(zip(survey.plain, survey.relative, strict=True)):
        figures = [
            f"{row.mass:<5.3f}  {row.recall:<8.3f}  {row.best:<10.3f}" for row in (plain, other)
        ]
        mark = "*" if number == layer else " "
        lines.append(
            f"{mark} {number:<5}  {plain.questions:<9}  {plain.share:<8.3f}  {figures[0]}     "
            f"{figures[1]}"
        )
    way = f" --relative-to {survey.generic!r}" if relative else ""
    lines += [
        "",
        f"most evidence in the best quarter of tokens: --rfm from-llm:{layer}{way}",
        f"--rfm from-llm alone takes {survey.default} ({survey.source})",
    ]
    return "\n".join(line.rstrip() for line in lines)
