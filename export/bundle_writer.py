"""From a checkpoint to a bundle on disk: the order of things, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lrs_edge.export.model_card import model_card
from lrs_edge.export.onnx_writer import Precision, WeightFile
from lrs_edge.export.recipes import Recipe, find_recipe
from lrs_edge.export.stages import DecoderStage, Model
from lrs_edge.export.tensors import Array
from lrs_edge.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    SCHEMA_VERSION,
    DecoderSpec,
    FileEntry,
    Manifest,
    SearchSpec,
    Source,
    VisionSpec,
)

VISION, RFM, RFM_MASKED, LLM = "vision.onnx", "rfm.onnx", "rfm_masked.onnx", "llm.onnx"
EMBEDDINGS, TOKENIZER = "embeddings.safetensors", "tokenizer.json"
MANIFEST, CARD = "manifest.json", "MODEL_CARD.md"

_ROLES = {
    VISION: "vision",
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
    """

    vision_tower: str | None = None
    name: str | None = None
    precisions: Precisions = field(default_factory=Precisions)
    licence: str | None = None
    parity: bool = True
    parity_images: Path | None = None
    force: bool = False


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
    _check_target(target, force=options.force)
    recipe = None if Path(checkpoint).is_dir() else find_recipe(checkpoint)
    found = find_checkpoint(recipe.checkpoint if recipe else checkpoint)
    tower = options.vision_tower or (recipe.vision_tower if recipe else None)
    progress(f"reading {found.path}")
    model = read_model(found, tower)
    if recipe and recipe.family != model.family:
        raise ExportError(f"{found.path} is of family {model.family}, not {recipe.family}")
    try:
        with _replacing(target) as folder:
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
        self._progress(f"writing {RFM} and {RFM_MASKED} ({precisions.rfm})")
        with self._weights(RFM, precisions.rfm) as weights:
            decoder_graph.write_rfm(model.rfm, "gqa", self._folder / RFM, weights)
            decoder_graph.write_rfm(model.rfm, "masked", self._folder / RFM_MASKED, weights)
        self._progress(f"writing {LLM} ({precisions.llm})")
        head = decoder_graph.LanguageHead(model.vocabulary, model.lm_head)
        with self._weights(LLM, precisions.llm) as weights:
            decoder_graph.write_llm(model.llm, head, self._folder / LLM, weights)
        self._progress(f"writing {EMBEDDINGS} and {TOKENIZER}")
        rounded = precisions.llm != "fp32"
        tables = {
            EMBED_TOKENS: _halved(model.embed_tokens(), rounded=rounded),
            IMAGE_NEWLINE: _halved(model.image_newline(), rounded=rounded),
        }
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
        )


def _entry(path: Path) -> FileEntry:
    role = _ROLES[path.name.removesuffix(".data")]
    return FileEntry(role, path.stat().st_size, file_sha256(path))


def _decoder_spec(
    stage: DecoderStage,
    graph: str,
    precision: Precision,
    *,
    vocabulary: int = 0,
    masked_graph: str | None = None,
) -> DecoderSpec:
    config = stage.config
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


def _check_target(target: Path, *, force: bool) -> None:
    if target.is_dir():
        if any(target.iterdir()) and not force:
            raise ExportError(f"{target} exists and is not empty; pass --force to replace it")
        if any(target.iterdir()) and not (target / MANIFEST).is_file():
            raise ExportError(f"{target} is not a bundle (no {MANIFEST}); remove it yourself")
    elif target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists and is not a directory; name another one")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory beside the target that takes its place if all goes well."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = work / "bundle"
        folder.mkdir()
        yield folder
        _swap(folder, target, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(folder: Path, target: Path, old: Path) -> None:
    """Put a directory in another's place; that cannot be one step, but it can be undone."""
    if target.exists():
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _now() -> str:
    """UTC time; SOURCE_DATE_EPOCH fixes it for reproducible bundles."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
