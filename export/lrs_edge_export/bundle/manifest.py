"""Model card and manifest of a bundle whose other parts are written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from lrs_edge.bundle.manifest import (
    SCHEMA_VERSION,
    DecoderSpec,
    FileEntry,
    Flavour,
    GraphFile,
    Manifest,
    ObjectSpec,
    SearchSpec,
    SegmentSpec,
    Source,
    TowerSpec,
    VisionSpec,
)
from lrs_edge.bundle.parity import ParityReport
from lrs_edge_export.bundle.model_card import model_card
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.stages import (
    LLM,
    LLM_INT8_KV,
    LLM_REST,
    PROJECTOR,
    RFM,
    RFM_MASKED,
    TOWER,
    VISION,
    VISION_FUSED,
    Plans,
    segment_names,
)
from lrs_edge_export.checkpoints.checkpoint import file_sha256
from lrs_edge_export.checkpoints.model import DecoderStage, Model
from lrs_edge_export.checkpoints.vision import ObjectHead, VisionStage
from lrs_edge_export.graphs.flops import graph_flops
from lrs_edge_export.quantization.precision import Plan

EMBEDDINGS, TOKENIZER = "embeddings.safetensors", "tokenizer.json"
MANIFEST, CARD = "manifest.json", "MODEL_CARD.md"

_ROLES = {
    VISION: "vision",
    VISION_FUSED: "vision",
    TOWER: "vision",
    PROJECTOR: "vision",
    RFM: "rfm",
    RFM_MASKED: "rfm",
    LLM: "llm",
    LLM_INT8_KV: "llm",
    LLM_REST: "llm",
    EMBEDDINGS: "embeddings",
    TOKENIZER: "tokenizer",
    CARD: "documentation",
}

_RFM_GRAPHS = (GraphFile(RFM, Flavour.GQA), GraphFile(RFM_MASKED, Flavour.MASKED))

_TOOLS = ("lrs-edge", "numpy", "onnx", "onnxruntime", "safetensors", "tokenizers", "torch")


@dataclass(frozen=True)
class Origin:
    """Where a bundle comes from.

    Attributes:
        name: Of the bundle.
        source: The checkpoint.
        licence: Of the weights.
        card: What the checkpoint says about itself; may be empty.
    """

    name: str
    source: Source
    licence: str
    card: str


class BundleFolder:
    """The folder of a bundle in the making.

    Args:
        folder: Holds graphs, embeddings and tokenizer.
        model: What was exported.
        options: How.
        origin: From what.
    """

    def __init__(self, folder: Path, model: Model, options: ExportOptions, origin: Origin) -> None:
        self._folder = folder
        self._model = model
        self._options = options
        self._origin = origin

    def write_manifest(self, plans: Plans, report: ParityReport) -> Manifest:
        """Write model card and manifest, in place of earlier ones.

        Args:
            plans: Of the stages.
            report: Everything that was measured.
        """
        for name in (CARD, MANIFEST):
            (self._folder / name).unlink(missing_ok=True)
        model, origin = self._model, self._origin
        files = {path.name: _entry(path) for path in sorted(self._folder.iterdir())}
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=origin.name,
            family=model.family,
            licence=origin.licence,
            source=origin.source,
            created=_now(),
            tools={name: _version(name) for name in _TOOLS},
            files=files,
            vision=self._vision_spec(plans.vision),
            rfm=None if model.rfm is None else _decoder_spec(model.rfm, _RFM_GRAPHS, plans.rfm),
            llm=self._llm_spec(plans.llm),
            prompt=model.prompt,
            search=SearchSpec(base_side=model.base_side, relative_to=self._options.relative_to),
            limits=model.limits,
            embeddings=EMBEDDINGS,
            tokenizer=TOKENIZER,
            repetition_penalty=model.repetition.penalty,
            penalised_ids=model.repetition.penalised_ids,
            penalise_prompt=model.repetition.prompt,
            parity=report,
            exact_integers=True,
        )
        card = self._folder / CARD
        card.write_text(model_card(manifest, origin.card), encoding="utf-8")
        manifest = msgspec.structs.replace(manifest, files=files | {CARD: _entry(card)})
        encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        (self._folder / MANIFEST).write_bytes(encoded + b"\n")
        return manifest

    def _tower_spec(self) -> TowerSpec:
        counted = (graph_flops(self._folder / name) for name in (TOWER, PROJECTOR))
        return TowerSpec(TOWER, PROJECTOR, *counted)

    def _vision_spec(self, plan: Plan) -> VisionSpec:
        stage = self._model.vision
        graphs = [GraphFile(VISION, Flavour.PLAIN)]
        if (self._folder / VISION_FUSED).is_file():
            graphs.append(GraphFile(VISION_FUSED, Flavour.FUSED))
        return VisionSpec(
            graphs=tuple(graphs),
            tile=stage.tile,
            grid=stage.grid,
            local_pool=stage.local_pool,
            mean=stage.mean,
            std=stage.std,
            precision=plan.precision,
            positions=0 if self._model.positions is None else self._model.positions.entries,
            flops=graph_flops(self._folder / VISION),
            pooling=stage.pooling,
            tower=self._tower_spec() if self._options.vision_attention else None,
            objects=None if stage.objects is None else _object_spec(stage.objects, stage),
            stretched=stage.stretched,
            filter=stage.filter,
        )

    def _llm_spec(self, plan: Plan) -> DecoderSpec:
        graphs = [GraphFile(LLM, Flavour.GQA)]
        if self._model.rfm is not None and self._model.rfm.of_llm:
            graphs.append(GraphFile(LLM_REST, Flavour.GQA_REST))
        if self._options.int8_kv:
            graphs.append(GraphFile(LLM_INT8_KV, Flavour.GQA_INT8_KV))
        return _decoder_spec(
            self._model.llm,
            tuple(graphs),
            plan,
            vocabulary=self._model.vocabulary,
            cuts=self._options.attention_layers,
        )


def _entry(path: Path) -> FileEntry:
    name = path.name.removesuffix(".data")
    role = "llm" if name.startswith("llm_segment") else _ROLES[name]
    return FileEntry(role, path.stat().st_size, file_sha256(path))


def _object_spec(head: ObjectHead, stage: VisionStage) -> ObjectSpec:
    return ObjectSpec(head.labels, head.scale * stage.tower.grid, head.thresholds, head.aliases)


def _decoder_spec(
    stage: DecoderStage,
    graphs: tuple[GraphFile, ...],
    plan: Plan,
    *,
    vocabulary: int = 0,
    cuts: tuple[int, ...] = (),
) -> DecoderSpec:
    config = stage.config
    edges = (0, *cuts, config.layers)
    segments = tuple(
        SegmentSpec(name, first, end - first)
        for name, first, end in zip(
            segment_names(len(cuts) + 1), edges[:-1], edges[1:], strict=True
        )
    )
    return DecoderSpec(
        graphs=graphs,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.buffer_dim,
        hidden=config.hidden,
        vocabulary=vocabulary,
        precision=plan.precision,
        intermediate=config.intermediate,
        segments=segments if cuts else (),
        floats=np.dtype(plan.floats).name,
        deepstack=config.deepstack,
    )


def _now() -> str:
    """UTC time; SOURCE_DATE_EPOCH fixes it for reproducible bundles."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
