"""`lrs-edge distill`: from a checkpoint and questions to a checkpoint with a trained RFM."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lrs_edge.engines.cores import thread_count
from lrs_edge.errors import ExportError, UsageError
from lrs_edge_export.checkpoints.checkpoint import (
    Checkpoint,
    file_sha256,
    find_checkpoint,
    source_hash,
)
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.checkpoint_writer import check_distilled, write_checkpoint
from lrs_edge_export.distill.collect import Collector, OnProgress, Targets, collect
from lrs_edge_export.distill.features import open_encoder
from lrs_edge_export.distill.localise import (
    LOCALISE_QUESTIONS,
    Row,
    choose_layers,
    measure_layers,
)
from lrs_edge_export.distill.measure import Measured, measure, random_scorer, student_scorer
from lrs_edge_export.distill.options import (
    DistillOptions,
    DistillResult,
    Precision,
    torch_device,
)
from lrs_edge_export.distill.questions import (
    TrainingQuestion,
    image_folder,
    question_files,
    read_questions,
)
from lrs_edge_export.distill.sequences import Assembler, QuestionGroup, by_image
from lrs_edge_export.distill.start import (
    check_layer_list,
    own_layers,
    start_layers,
    with_start_layers,
)
from lrs_edge_export.distill.student import Student
from lrs_edge_export.distill.train import Trainer
from lrs_edge_export.distill.work import Work
from lrs_edge_export.families.recipes import resolve
from lrs_edge_export.families.registry import read_model

#: Layers N of a student whose checkpoint has none.
DEFAULT_LAYERS = 2

#: Families whose checkpoints the authors' code reads.
_AUTHORS = ("llava_qwen", "llava_llama")

#: Sequences on which a student is measured.
MEASURED_GROUPS = 80

_LOCALISATION = "localisation.json"


def distill(
    checkpoint: str,
    data: Path,
    target: Path,
    options: DistillOptions | None = None,
    progress: OnProgress = lambda _: None,
) -> DistillResult:
    """Train the RFM of a checkpoint by attention distillation, and write a new checkpoint.

    What was done before a break is found again in the work folder.

    Args:
        checkpoint: Local folder or hub name; it is only read.
        data: Folder with question files of LRS-VQA's form, or one such file.
        target: Folder of the new checkpoint.
        options: See `DistillOptions`.
        progress: Called with one line per step.

    Raises:
        ExportError: The checkpoint is not usable, or the target is in the way.
        UsageError: Options or data are not valid.
        ImageError: An image cannot be read.
        BackendError: A device is not there.
    """
    options = options or DistillOptions()
    device = torch_device(options.device)
    # "." has no name, and its parent is not beside it.
    target = target.absolute()
    if options.threads is not None:
        torch.set_num_threads(thread_count(options.threads) or 1)
    name, recipe = resolve(checkpoint)
    if recipe and options.vision_tower is None:
        options = replace(options, vision_tower=recipe.vision_tower)
    found = find_checkpoint(name)
    check_distilled(target, found.path, force=options.force)
    files = question_files(data)
    questions = read_questions(files)
    run = _Run(found, options, questions, device, progress)
    images = image_folder(data, options.images, questions)
    work = options.work or target.with_name(f"{target.name}.work")
    return run.finish(run.prepare(files, images, work), target)


@dataclass(frozen=True)
class _Prepared:
    """What training needs."""

    work: Work
    model: Model
    collector: Collector
    layer_list: tuple[int, ...]
    localisation: tuple[Row, ...] | None
    learned: list[QuestionGroup]
    held: list[QuestionGroup]


class _Run:
    """One distillation, step by step."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: DistillOptions,
        questions: list[TrainingQuestion],
        device: torch.device,
        progress: OnProgress,
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._questions = questions
        self._device = device
        self._progress = progress
        self._begun = time.monotonic()
        progress(f"reading {checkpoint.path}")
        self._model = read_model(checkpoint, options.vision_tower)
        if self._model.llm.config.deepstack:
            raise ExportError(
                f"{checkpoint.path}: no RFM can be trained for checkpoints of family "
                f"{self._model.family!r}, whose vision tokens bring something for each of several "
                "layers of the language model; use its own layers, `lrs-edge export --rfm from-llm`"
            )
        self._count = self._layer_count()

    def _layer_count(self) -> int:
        """N, checked against the checkpoint."""
        options = self._options
        layers = self._model.llm.config.layers
        own = own_layers(self._checkpoint)
        if options.layer_list is not None:
            check_layer_list(options.layer_list, layers)
            if options.layers not in (None, len(options.layer_list)):
                raise UsageError("--layers and --layer-list differ; give one of them")
        elif not any(question.boxes for question in self._questions):
            raise UsageError(
                "no question has an evidence box (hbox), so that it cannot be measured which "
                "layers of the language model localise; name them with --layer-list"
            )
        count = len(options.layer_list or ()) or options.layers or own or DEFAULT_LAYERS
        if not 1 <= count < layers:
            raise UsageError(
                f"--layers is {count}; the language model has {layers} layers, so it must be "
                f"1..{layers - 1}"
            )
        if options.from_existing and own != count:
            have = "no RFM" if own is None else f"an RFM of {own} layers"
            raise UsageError(
                f"--from-existing: the checkpoint has {have}, {count} are asked for; leave it out, "
                "or give --layers that fit"
            )
        return count

    def prepare(self, files: Sequence[Path], images: Path, work_path: Path) -> _Prepared:
        """Everything up to the training: features, layers, targets."""
        options, progress = self._options, self._progress
        any_list = tuple(range(1, self._count + 1))
        model = with_start_layers(self._model, options.layer_list or any_list)
        progress("hashing the checkpoint")
        work = Work(work_path, self._stamp(model, files))
        encoder, graph = open_encoder(model, work.path, options.threads)
        assembler = Assembler(model, encoder, self._questions, images, work.path)
        collector = Collector(assembler, self._questions, options.sampling)
        learned, held = self._split()
        rows = None
        layer_list = options.layer_list
        if layer_list is None:
            rows = self._localise(work, collector, model, learned)
            layer_list = choose_layers(rows, self._count)
            progress(f"learning from layers {', '.join(map(str, layer_list))}")
        targets = self._targets(work, layer_list)
        arguments = (model.llm, layer_list, self._device, targets, progress)
        prepared = _Prepared(
            work=work,
            model=model,
            collector=collector,
            layer_list=layer_list,
            localisation=rows,
            learned=collect(collector, learned, *arguments),
            held=collect(collector, held, *arguments),
        )
        # Everything is encoded; the tower's memory is the student's now.
        graph.release()
        return prepared

    def _stamp(self, model: Model, files: Sequence[Path]) -> dict[str, Any]:
        options = self._options
        return {
            "checkpoint": source_hash(model.folders),
            "data": [file_sha256(path) for path in files],
            "layers": self._count,
            "tiles per level": options.sampling.tiles,
            "seed": options.sampling.seed,
            "limit": options.limit,
            "held-out share": options.held_out,
        }

    def _split(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Questions to learn from and those to measure on, by image."""
        options = self._options
        images = dict(by_image(self._questions, range(len(self._questions))))
        names = sorted(images)
        shuffled = seeded(options.sampling.seed, "images").permutation(len(names))
        order = [names[int(place)] for place in shuffled]
        if options.limit is not None:
            chosen, total = [], 0
            for image in order:
                if total < options.limit:
                    chosen.append(image)
                    total += len(images[image])
            order = chosen
        count = min(max(round(options.held_out * len(order)), 1), len(order) - 1)
        if count < 1:
            self._progress("one image only: nothing is held out, figures are of what was learned")
            return {order[0]: images[order[0]]}, {order[0]: images[order[0]]}
        held = {image: images[image] for image in order[:count]}
        return {image: images[image] for image in order[count:]}, held

    def _localise(
        self, work: Work, collector: Collector, model: Model, images: Mapping[str, list[int]]
    ) -> tuple[Row, ...]:
        known = work.read(_LOCALISATION)
        if known is None:
            boxed: dict[str, list[int]] = {}
            total = 0
            for image, numbers in images.items():
                useful = [number for number in numbers if self._questions[number].boxes]
                useful = useful[: LOCALISE_QUESTIONS - total]
                if useful:
                    boxed[image] = useful
                    total += len(useful)
            rows, _ = measure_layers(collector, boxed, model.llm, self._device, self._progress)
            known = [asdict(row) for row in rows]
            work.write(_LOCALISATION, known)
        return tuple(Row(**row) for row in known)

    def _targets(self, work: Work, layer_list: tuple[int, ...]) -> Targets:
        return Targets(work.path / f"targets-{'-'.join(map(str, layer_list))}")

    def finish(self, prepared: _Prepared, target: Path) -> DistillResult:
        """Train, measure and write."""
        options, progress = self._options, self._progress
        targets = self._targets(prepared.work, prepared.layer_list)
        started = self._model
        if not options.from_existing:
            started = with_start_layers(started, prepared.layer_list)
        stage = started.region_focus
        student = Student.read(stage, self._device, half=_half(options.precision, self._device))
        assembler = prepared.collector.assembler
        held = prepared.held[:: max(len(prepared.held) // MEASURED_GROUPS, 1)]
        progress(f"measuring on {len(held)} held-out sequences")
        before = measure(held, assembler, targets, {"before": student_scorer(student)})
        trainer = Trainer(
            student,
            prepared.learned,
            assembler,
            targets,
            options.train,
            prepared.work.path / f"state-{self._train_key(prepared.layer_list)}.pt",
        )
        if self._starts_perfect(prepared.layer_list):
            progress(
                "nothing to train: the RFM's layers are the language model's first ones and see "
                "what it sees; only --evidence-weight could take it further"
            )
        else:
            progress(f"training on {len(prepared.learned)} sequences")
            trainer.run(progress)
        progress("measuring")
        scorers = {
            "after": student_scorer(student),
            "random": random_scorer(options.sampling.seed),
        }
        after = measure(held, assembler, targets, scorers)
        measured = _ordered(before, after)
        report = self._report(prepared, trainer, measured)
        write_checkpoint(
            self._checkpoint,
            target,
            self._model.llm.tensors,
            student.state(),
            prepared.layer_list,
            report,
            # Only the authors' loader makes whole decoder layers.
            whole_last_layer=prepared.model.family in _AUTHORS,
        )
        return DistillResult(target, prepared.layer_list, prepared.localisation, measured, report)

    def _starts_perfect(self, layer_list: tuple[int, ...]) -> bool:
        """Whether the student is equal to the teacher, so that training could only add noise."""
        options = self._options
        first = start_layers(layer_list) == tuple(range(len(layer_list) + 1))
        return first and not options.from_existing and options.train.weights.evidence == 0

    def _train_key(self, layer_list: tuple[int, ...]) -> str:
        """A short name of everything that the training's course depends on."""
        options = self._options
        train = {k: v for k, v in asdict(options.train).items() if k != "save_every"}
        values = [train, layer_list, options.from_existing, options.precision, options.device]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]

    def _report(
        self, prepared: _Prepared, trainer: Trainer, measured: Sequence[Measured]
    ) -> dict[str, Any]:
        options = self._options
        return {
            "checkpoint": self._checkpoint.path.resolve().name,
            "checkpoint_sha256": source_hash(prepared.model.folders),
            "llm_layer_list": list(prepared.layer_list),
            "started_from": "its own RFM" if options.from_existing else "layers of its LLM",
            "questions": len(self._questions),
            "sequences": {"learned": len(prepared.learned), "held_out": len(prepared.held)},
            "localisation": [asdict(row) for row in prepared.localisation or ()],
            "measured": [asdict(row) for row in measured],
            "train": asdict(options.train) | {"precision": options.precision},
            "sampling": asdict(options.sampling),
            "steps": trainer.step,
            "train_seconds": round(trainer.seconds, 1),
            "last_loss": None if math.isnan(trainer.loss) else trainer.loss,
            "seconds": round(time.monotonic() - self._begun, 1),
            "tools": {name: metadata.version(name) for name in ("lrs-edge", "torch")},
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def _ordered(before: Sequence[Measured], after: Sequence[Measured]) -> tuple[Measured, ...]:
    """Teacher, before, after, random; base level first."""
    order = ("teacher", "before", "after", "random")
    rows = {(row.levels, row.who): row for row in (*before, *after)}
    return tuple(
        rows[levels, who] for levels in ("base", "finer") for who in order if (levels, who) in rows
    )


def _half(precision: Precision, device: torch.device) -> bool:
    """Whether products are made in bfloat16."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Not public, and not in every version; without it the answer is no.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(native())
