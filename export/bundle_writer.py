"""From a checkpoint to a bundle on disk: the order of things, and nothing half-written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lrs_edge.errors import ExportError
from lrs_edge.export import decoder_graph, parity, vision_graph
from lrs_edge.export.checkpoint import Checkpoint, file_sha256, find_checkpoint, source_hash
from lrs_edge.export.families import read_model
from lrs_edge.export.flops import graph_flops
from lrs_edge.export.model_card import model_card
from lrs_edge.export.onnx_writer import Precision, WeightFile
from lrs_edge.export.recipes import Recipe, find_recipe
from lrs_edge.export.stages import ClipTower, DecoderStage, Model
from lrs_edge.export.target import check_target, replacing_folder
from lrs_edge.export.tensors import Array
from lrs_edge.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    POSITION_COLS,
    POSITION_ROWS,
    SCHEMA_VERSION,
    DecoderSpec,
    FileEntry,
    Manifest,
    SearchSpec,
    SegmentSpec,
    Source,
    TowerSpec,
    VisionSpec,
)

VISION, RFM, RFM_MASKED, LLM = "vision.onnx", "rfm.onnx", "rfm_masked.onnx", "llm.onnx"
TOWER, PROJECTOR = "vision_tower.onnx", "projector.onnx"
EMBEDDINGS, TOKENIZER = "embeddings.safetensors", "tokenizer.json"
MANIFEST, CARD = "manifest.json", "MODEL_CARD.md"

_ROLES = {
    VISION: "vision",
    TOWER: "vision",
    PROJECTOR: "vision",
    RFM: "rfm",
    RFM_MASKED: "rfm",
    LLM: "llm",
    EMBEDDINGS: "embeddings",
    TOKENIZER: "tokenizer",
    CARD: "documentation",
}

_TOOLS = ("lrs-edge", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers", "torch")


@dataclass(frozen=True)
class Precisions:
    """Precision of the weights, per stage."""

    vision: Precision = "fp32"
    rfm: Precision = "fp32"
    llm: Precision = "fp32"

    @classmethod
    def all(cls, precision: Precision) -> Precisions:
        """The same for every stage."""
        return cls(precision, precision, precision)


@dataclass(frozen=True)
class ExportOptions:
    """What the user can choose.

    Attributes:
        vision_tower: Folder or hub name of the vision tower; None to follow config.json.
        name: Of the bundle; None takes the checkpoint's.
        precisions: Of the weights.
        licence: Of the weights; None takes the recipe's.
        parity: Whether to compare with PyTorch at the end.
        parity_images: Folder of images for that; None takes synthetic ones.
        force: Replace an existing target.
        attention_layers: Layers after which the LLM is also cut into segments, for ways to prune
            that need attention from inside it; ascending.
        vision_attention: Also write tower and projector apart, for ways to prune that need
            attention from inside a CLIP tower.
    """

    vision_tower: str | None = None
    name: str | None = None
    precisions: Precisions = field(default_factory=Precisions)
    licence: str | None = None
    parity: bool = True
    parity_images: Path | None = None
    force: bool = False
    attention_layers: tuple[int, ...] = ()
    vision_attention: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What was written: the bundle's directory, its manifest, and the parity report, if any."""

    path: Path
    manifest: Manifest
    report: parity.ParityReport | None


def export_bundle(
    checkpoint: str,
    target: Path,
    options: ExportOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export a checkpoint.

    The bundle is written beside the target under another name and renamed at the end, so that a
    failure leaves nothing behind, and an existing bundle untouched.

    Args:
        checkpoint: Local folder, name of a recipe, or hub name.
        target: Directory of the bundle.
        options: See `ExportOptions`.
        progress: Called with one line per step.

    Raises:
        ExportError: The checkpoint is not usable, the target is in the way or cannot be written,
            or the parity check fails.
    """
    options = options or ExportOptions()
    check_target(target, mark=MANIFEST, made_by="a bundle", force=options.force)
    recipe = None if Path(checkpoint).is_dir() else find_recipe(checkpoint)
    found = find_checkpoint(recipe.checkpoint if recipe else checkpoint)
    tower = options.vision_tower or (recipe.vision_tower if recipe else None)
    progress(f"reading {found.path}")
    model = read_model(found, tower)
    if recipe and recipe.family != model.family:
        raise ExportError(f"{found.path} is of family {model.family}, not {recipe.family}")
    _check_cuts(options.attention_layers, model.llm.config.layers)
    if options.vision_attention:
        _clip_tower(model).check_next_layer()
    try:
        with replacing_folder(target) as folder:
            writer = _BundleWriter(folder, model, options, progress)
            writer.write_parts()
            report = writer.compare() if options.parity else None
            progress("hashing the checkpoint")
            source = Source(_source_name(found), source_hash(model.folders))
            manifest = writer.finish(source, _licence(options, recipe), report, found.card())
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error})") from error
    return ExportResult(target, manifest, report)


class _BundleWriter:
    """Writes the parts of one bundle into one folder."""

    def __init__(
        self, folder: Path, model: Model, options: ExportOptions, progress: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._model = model
        self._options = options
        self._progress = progress

    def write_parts(self) -> None:
        """Graphs, embeddings and tokenizer."""
        model, precisions = self._model, self._options.precisions
        self._progress(f"writing {VISION} ({precisions.vision})")
        with self._weights(VISION, precisions.vision) as weights:
            vision_graph.write_vision(model.vision, self._folder / VISION, weights)
            if self._options.vision_attention:
                parts = self._folder / TOWER, self._folder / PROJECTOR
                tower = _clip_tower(model)
                vision_graph.write_tower(model.vision, tower, *parts, weights)
        self._progress(f"writing {RFM} and {RFM_MASKED} ({precisions.rfm})")
        with self._weights(RFM, precisions.rfm) as weights:
            decoder_graph.write_rfm(model.rfm, "gqa", self._folder / RFM, weights)
            decoder_graph.write_rfm(model.rfm, "masked", self._folder / RFM_MASKED, weights)
        self._progress(f"writing {LLM} ({precisions.llm})")
        head = decoder_graph.LanguageHead(model.vocabulary, model.lm_head)
        with self._weights(LLM, precisions.llm) as weights:
            decoder_graph.write_llm(model.llm, head, self._folder / LLM, weights)
            cuts = self._options.attention_layers
            if cuts:
                self._progress(f"writing the layers of {LLM} in {len(cuts) + 1} segments")
                paths = [self._folder / name for name in _segment_names(len(cuts) + 1)]
                decoder_graph.write_llm_segments(model.llm, head, cuts, paths, weights)
        self._progress(f"writing {EMBEDDINGS} and {TOKENIZER}")
        rounded = precisions.llm != "fp32"
        tables = {
            EMBED_TOKENS: _halved(model.embed_tokens(), rounded=rounded),
            IMAGE_NEWLINE: _halved(model.image_newline(), rounded=rounded),
        }
        if model.positions is not None:
            tables[POSITION_ROWS] = _halved(model.positions.rows(), rounded=rounded)
            tables[POSITION_COLS] = _halved(model.positions.cols(), rounded=rounded)
        (self._folder / EMBEDDINGS).write_bytes(save(tables))
        (self._folder / TOKENIZER).write_bytes(model.tokenizer_json.encode())

    def compare(self) -> parity.ParityReport:
        """Compare with PyTorch. Raises ExportError above a limit."""
        self._progress("comparing with PyTorch")
        graphs = parity.Graphs(
            vision=self._folder / VISION,
            rfm=self._folder / RFM,
            llm=self._folder / LLM,
        )
        precisions = self._options.precisions
        report = parity.compare(
            self._model,
            graphs,
            (precisions.vision, precisions.rfm, precisions.llm),
            self._options.parity_images,
        )
        report.raise_if_failed()
        return report

    def finish(
        self, source: Source, licence: str, report: parity.ParityReport | None, about: str
    ) -> Manifest:
        """Model card (with what the checkpoint says about itself) and manifest."""
        files = {path.name: _entry(path) for path in sorted(self._folder.iterdir())}
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=self._options.name or source.name.rsplit("/", 1)[-1],
            family=self._model.family,
            licence=licence,
            source=source,
            created=_now(),
            tools={name: _version(name) for name in _TOOLS},
            files=files,
            vision=self._vision_spec(),
            rfm=_decoder_spec(
                self._model.rfm, RFM, self._options.precisions.rfm, masked_graph=RFM_MASKED
            ),
            llm=_decoder_spec(
                self._model.llm,
                LLM,
                self._options.precisions.llm,
                vocabulary=self._model.vocabulary,
                cuts=self._options.attention_layers,
            ),
            prompt=self._model.prompt,
            search=SearchSpec(base_side=self._model.base_side),
            limits=self._model.limits,
            embeddings=EMBEDDINGS,
            tokenizer=TOKENIZER,
            repetition_penalty=self._model.repetition.penalty,
            penalised_ids=self._model.repetition.penalised_ids,
            parity=report.values() if report else {},
        )
        card = self._folder / CARD
        card.write_text(model_card(manifest, report, about), encoding="utf-8")
        manifest = msgspec.structs.replace(manifest, files=files | {CARD: _entry(card)})
        encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        (self._folder / MANIFEST).write_bytes(encoded + b"\n")
        return manifest

    def _weights(self, graph: str, precision: Precision) -> WeightFile:
        return WeightFile(self._folder / f"{graph}.data", precision)

    def _tower_spec(self) -> TowerSpec:
        counted = (graph_flops(self._folder / name) for name in (TOWER, PROJECTOR))
        return TowerSpec(TOWER, PROJECTOR, *counted)

    def _vision_spec(self) -> VisionSpec:
        stage = self._model.vision
        return VisionSpec(
            graph=VISION,
            tile=stage.tile,
            grid=stage.tower.grid,
            local_pool=stage.local_pool,
            mean=stage.mean,
            std=stage.std,
            precision=self._options.precisions.vision,
            positions=0 if self._model.positions is None else self._model.positions.entries,
            flops=graph_flops(self._folder / VISION),
            tower=self._tower_spec() if self._options.vision_attention else None,
        )


def _segment_names(count: int) -> list[str]:
    """Files of the LLM's segments."""
    return [f"llm_segment{number}.onnx" for number in range(count)]


def _check_cuts(cuts: tuple[int, ...], layers: int) -> None:
    if cuts and (list(cuts) != sorted(set(cuts)) or cuts[0] < 1 or cuts[-1] >= layers):
        raise ExportError(
            f"--attention-layers {','.join(map(str, cuts))} does not cut the {layers} layers of "
            f"the language model; name ascending layers from 1 to {layers - 1}"
        )


def _clip_tower(model: Model) -> ClipTower:
    tower = model.vision.tower
    if not isinstance(tower, ClipTower):
        raise ExportError(
            f"--vision-attention needs a CLIP tower; that of a {model.family} checkpoint is a "
            "convolutional network, which has no attention to give out"
        )
    return tower


def _entry(path: Path) -> FileEntry:
    name = path.name.removesuffix(".data")
    role = "llm" if name.startswith("llm_segment") else _ROLES[name]
    return FileEntry(role, path.stat().st_size, file_sha256(path))


def _decoder_spec(
    stage: DecoderStage,
    graph: str,
    precision: Precision,
    *,
    vocabulary: int = 0,
    masked_graph: str | None = None,
    cuts: tuple[int, ...] = (),
) -> DecoderSpec:
    config = stage.config
    edges = (0, *cuts, config.layers)
    segments = tuple(
        SegmentSpec(name, first, end - first)
        for name, first, end in zip(
            _segment_names(len(cuts) + 1), edges[:-1], edges[1:], strict=True
        )
    )
    return DecoderSpec(
        graph=graph,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden,
        vocabulary=vocabulary,
        masked_graph=masked_graph,
        precision=precision,
        intermediate=config.intermediate,
        segments=segments if cuts else (),
    )


def _source_name(checkpoint: Checkpoint) -> str:
    """Hub name, or a local folder's own name: paths of this machine are nobody else's business."""
    return checkpoint.name if checkpoint.from_hub else checkpoint.path.resolve().name


def _licence(options: ExportOptions, recipe: Recipe | None) -> str:
    if options.licence is not None:
        return options.licence
    return recipe.licence if recipe else "not stated"


def _halved(table: Array, *, rounded: bool) -> NDArray[np.float16] | Array:
    """A table as float16 where nothing is lost, or where rounding is asked for."""
    with np.errstate(over="ignore"):
        half = table.astype(np.float16)
    lossless = np.array_equal(half.astype(np.float32), table)
    fits = bool(np.isfinite(half).all())
    return half if lossless or (rounded and fits) else table


def _now() -> str:
    """UTC time; SOURCE_DATE_EPOCH fixes it for reproducible bundles."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
