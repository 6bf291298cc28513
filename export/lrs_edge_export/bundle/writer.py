"""From a checkpoint to a bundle on disk: the order of things, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from lrs_edge.bundle.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    POSITION_COLS,
    POSITION_ROWS,
    Manifest,
    Source,
)
from lrs_edge.bundle.parity import ParityReport
from lrs_edge.engines.devices import STAGE_NAMES
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.embeddings import write_embeddings
from lrs_edge_export.bundle.manifest import EMBEDDINGS, MANIFEST, TOKENIZER, BundleFolder, Origin
from lrs_edge_export.bundle.options import AccuracyCheck, ExportOptions, Precisions
from lrs_edge_export.bundle.stages import (
    LLM,
    LLM_INT8_KV,
    RFM,
    VISION,
    WRITTEN,
    StageWriter,
    clip_tower,
)
from lrs_edge_export.bundle.target import check_target, replacing_folder
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, find_checkpoint, source_hash
from lrs_edge_export.checkpoints.model import DecoderConfig, Model
from lrs_edge_export.checkpoints.rows import Rows
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.families.recipes import Recipe, resolve
from lrs_edge_export.families.registry import find_family, read_model
from lrs_edge_export.parity import check as parity
from lrs_edge_export.parity.accuracy import AccuracyReport, measure_accuracy
from lrs_edge_export.parity.graphs import Graphs
from lrs_edge_export.quantization import load_calibration
from lrs_edge_export.quantization.kv_scales import kv_scales
from lrs_edge_export.quantization.planning import Planned, Planner, asks_int4, is_large
from lrs_edge_export.quantization.smoothing import smoothed
from lrs_edge_export.quantization.work_folder import WorkFolder, digest_of_files

__all__ = ["AccuracyCheck", "ExportOptions", "ExportResult", "Precisions", "export_bundle"]


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what was measured.

    Attributes:
        path: The bundle's directory.
        manifest: Its manifest.
        report: Of the parity check, if there was one.
        planned: Plans of the stages, and what they are based on.
        accuracy: Of the finished bundle, if questions were given.
    """

    path: Path
    manifest: Manifest
    report: ParityReport | None
    planned: Planned
    accuracy: AccuracyReport | None = None


def export_bundle(
    checkpoint: str,
    target: Path,
    options: ExportOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export a checkpoint.

    The bundle is written beside the target under another name and renamed at the end, so that a
    failure leaves nothing behind, and an existing bundle untouched. What an export that was killed
    left beside the target is removed by the next one.

    Args:
        checkpoint: Local folder, name of a recipe, or hub name.
        target: Directory of the bundle.
        options: See `ExportOptions`.
        progress: Called with one line per step.

    Raises:
        ExportError: The checkpoint is not usable, the target is in the way or cannot be written, or
            the parity or the accuracy check fails.
    """
    options = options or ExportOptions()
    check_target(target, mark=MANIFEST, made_by="a bundle", force=options.force, progress=progress)
    found, recipe, model = _read(checkpoint, options, progress)
    if options.smoothed:
        progress("sharing the differences of activations with weights")
        model = _smoothed(model, options)

    @cache
    def contents() -> str:
        return source_hash(model.folders)

    try:
        with replacing_folder(target) as folder:
            work = _work_folder(model, options, target, contents)
            planner = Planner(model, options, folder, progress, work)
            planned = planner.plan()
            with _writer(model, folder, options, planner) as stages:
                parts = _Parts(stages, planned, planner, options, progress)
                parts.write()
                report = parts.compare() if options.parity else None
            progress("hashing the checkpoint")
            origin = Origin(
                name=options.name or _source_name(found).partition("@")[0].rsplit("/", 1)[-1],
                source=Source(_source_name(found), contents()),
                licence=_licence(options, recipe),
                card=found.card(),
            )
            bundle = BundleFolder(folder, model, options, origin)
            measured = planned.added_to(report or ParityReport())
            manifest = bundle.write_manifest(planned.plans, measured)
            accuracy = None
            if options.accuracy is not None:
                progress("asking the finished bundle")
                accuracy = measure_accuracy(folder, options.accuracy, progress=progress)
                accuracy.raise_if_failed()
                measured = msgspec.structs.replace(measured, accuracy=accuracy.entry)
                manifest = bundle.write_manifest(planned.plans, measured)
        if work is not None:
            work.remove()
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written ({error}); check the free space and the permissions"
        ) from error
    return ExportResult(target, manifest, report, planned, accuracy)


def _smoothed(model: Model, options: ExportOptions) -> Model:
    """The same model, for `int8-static` decoders without zero points."""
    data = load_calibration(options.calibration, model)
    rfm, llm = model.rfm, model.llm
    if "llm" in options.smoothed:
        llm = smoothed(llm, data.pruned)
    if rfm is not None and rfm.of_llm:
        rfm = replace(rfm, tensors=llm.tensors)
    elif rfm is not None and "rfm" in options.smoothed:
        rfm = smoothed(rfm, data.sequences)
    return replace(model, rfm=rfm, llm=llm)


def _with_rfm_of_llm(
    model: Model,
    layers: int | Literal["default"],
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    progress: Callable[[str], None],
) -> Model:
    """The model with its language model's first layers as RFM; says which, and why, if asked to."""
    if layers == "default":
        scoring = find_family(checkpoint).scoring
        layers, source = scoring.before(model.llm.config.layers), scoring.source
        if recipe is not None and recipe.rfm_layers:
            layers, source = recipe.rfm_layers, recipe.rfm_source
        progress(
            f"--rfm from-llm:{layers}: layer {layers} of the language model scores ({source}); "
            "`lrs-edge distill --measure` finds the best one for questions with boxes"
        )
    return model.with_rfm_of_llm(layers)


def _read(
    checkpoint: str, options: ExportOptions, progress: Callable[[str], None]
) -> tuple[Checkpoint, Recipe | None, Model]:
    """The checkpoint, its recipe if it has one, and its model as it is to be exported."""
    name, recipe = resolve(checkpoint)
    if options.revision is not None:
        if Path(name).is_dir():
            raise ExportError(f"--revision is for a checkpoint on the hub, and {name} is a folder")
        name = f"{name.partition('@')[0]}@{options.revision}"
    found = find_checkpoint(name, find_family, progress)
    tower = options.vision_tower or (recipe.vision_tower if recipe else None)
    progress(f"reading {found.path}")
    if recipe:
        _check_recipe(recipe, found)
    model = read_model(found, tower)
    for note in model.notes:
        progress(f"note: {note}")
    if options.local_pool is not None:
        model = replace(model, vision=model.vision.with_local_pool(options.local_pool))
    if options.rfm_layers is not None:
        model = _with_rfm_of_llm(model, options.rfm_layers, found, recipe, progress)
    _check_cuts(options.attention_layers, model.llm.config)
    if options.vision_attention:
        clip_tower(model).check_next_layer()
    return found, recipe, model


def _work_folder(
    model: Model, options: ExportOptions, target: Path, contents: Callable[[], str]
) -> WorkFolder | None:
    """Where matrices rounded to 4 bits are kept; None where that is not worth it."""
    stages = [stage for stage in STAGE_NAMES if asks_int4(stage, model, options)]
    if not stages or (options.work is None and not any(is_large(model, one) for one in stages)):
        return None
    beside = target.absolute().with_name(f".{target.name}.work")
    images = "" if options.calibration is None else digest_of_files(options.calibration)
    rfm = "no RFM" if model.rfm is None else f"{model.rfm.config.layers} {model.rfm.of_llm}"
    asked = f"{rfm} {options.local_pool}"
    return WorkFolder(options.work or beside, contents(), images, asked)


def _writer(model: Model, folder: Path, options: ExportOptions, planner: Planner) -> StageWriter:
    return StageWriter(
        model,
        folder,
        cuts=options.attention_layers,
        vision_attention=options.vision_attention,
        tiles=lambda: planner.data.tiles,
    )


class _Parts:
    """Writes and checks everything but the manifest and the model card."""

    def __init__(
        self,
        stages: StageWriter,
        planned: Planned,
        planner: Planner,
        options: ExportOptions,
        progress: Callable[[str], None],
    ) -> None:
        self._writer = stages
        self._folder = stages.folder
        self._model = stages.model
        self._planned = planned
        self._planner = planner
        self._options = options
        self._progress = progress

    def write(self) -> None:
        """Graphs, embeddings and tokenizer."""
        for stage in WRITTEN:
            plan = self._planned.plans.of(stage)
            self._progress(f"writing {stage} ({plan.precision})")
            self._writer.write(stage, plan)
        if self._options.int8_kv:
            self._progress("finding the scales of an int8 KV cache")
            weights = self._writer.weights["llm"]
            pruned = self._planner.data.pruned
            self._writer.write_int8_kv(kv_scales(self._model.llm, weights, pruned))
        self._progress(f"writing {EMBEDDINGS} and {TOKENIZER}")
        tables: dict[str, Rows | Array] = {
            EMBED_TOKENS: self._model.embed_tokens,
            IMAGE_NEWLINE: self._model.image_newline(),
        }
        if self._model.positions is not None:
            tables[POSITION_ROWS] = self._model.positions.rows()
            tables[POSITION_COLS] = self._model.positions.cols()
        rounded = self._planned.plans.llm.precision != "fp32"
        write_embeddings(self._folder / EMBEDDINGS, tables, rounded=rounded)
        (self._folder / TOKENIZER).write_bytes(self._model.tokenizer_json.encode())

    def compare(self) -> ParityReport:
        """Compare with PyTorch. Raises ExportError above a limit."""
        self._progress("comparing with PyTorch")
        graphs = Graphs(
            vision=self._folder / VISION,
            rfm=None if self._model.rfm is None else self._folder / RFM,
            llm=self._folder / LLM,
            llm_kv=self._folder / LLM_INT8_KV if self._options.int8_kv else None,
            rfm_weights=self._writer.weights.get("rfm"),
            llm_weights=self._writer.weights["llm"],
            embeddings=self._folder / EMBEDDINGS,
            tokenizer=self._folder / TOKENIZER,
        )
        plans = self._planned.plans
        report = parity.compare(
            self._model,
            graphs,
            (plans.vision.precision, plans.rfm.precision, plans.llm.precision),
            self._options.parity_images,
        )
        parity.raise_if_failed(report)
        return report


def _check_cuts(cuts: tuple[int, ...], config: DecoderConfig) -> None:
    layers = config.layers
    if cuts and (list(cuts) != sorted(set(cuts)) or cuts[0] < 1 or cuts[-1] >= layers):
        raise ExportError(
            f"--attention-layers {','.join(map(str, cuts))} does not cut the {layers} layers of "
            f"the language model; name ascending layers from 1 to {layers - 1}"
        )
    if cuts and cuts[0] < config.deepstack:
        raise ExportError(
            f"--attention-layers {','.join(map(str, cuts))}: the first {config.deepstack} layers "
            "of the language model add something to vision tokens and cannot be cut; name layers "
            f"from {config.deepstack} on"
        )


def _source_name(checkpoint: Checkpoint) -> str:
    """Hub name, or a local folder's own name: paths of this machine are nobody else's business."""
    return checkpoint.name if checkpoint.from_hub else checkpoint.path.resolve().name


def _check_recipe(recipe: Recipe, found: Checkpoint) -> None:
    """Refuse a checkpoint that is another than the recipe's. Raises ExportError."""
    architectures = found.config.values.get("architectures")
    if architectures != [recipe.architecture]:
        raise ExportError(
            f"{found.path} has architectures {str(architectures)[:80]}, the recipe {recipe.name} "
            f"is for {recipe.architecture}; name the folder to export it nevertheless"
        )


def _licence(options: ExportOptions, recipe: Recipe | None) -> str:
    if options.licence is not None:
        return options.licence
    return recipe.licence if recipe else "not stated"
