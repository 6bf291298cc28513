"""Numbers and texts of a manifest that no model has, refused before anything is made from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrs_edge.bundle.calibration import calibration_problems
from lrs_edge.bundle.layout import (
    LocalRows,
    LocalTiles,
    Objects,
    PromptSpec,
    Question,
    Separator,
    Text,
    TokenIds,
    problems,
)
from lrs_edge.bundle.manifest import (
    DecoderSpec,
    Flavour,
    Manifest,
    ObjectSpec,
    StageSpec,
    VisionSpec,
)
from lrs_edge.errors import BundleError

#: Bounds in the manner of `lrs_edge_export.families.parts`: several times what the largest
#: models have.
#: Smaller tiles would make millions of an ordinary scene.
MIN_TILE, MAX_TILE = 16, 4096
MAX_LAYERS = 256
MAX_HEADS = 1024
MAX_WIDTH = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_TOKENS = 1 << 20
MAX_POSITIONS = 1 << 12
#: Vectors that a vision token has besides its embedding; Qwen3-VL has 3.
MAX_DEEPSTACK = 16
#: Positions that a token can have: one, or time, row and column.
POSITION_AXES = (1, 3)
#: Tiles along the base level's long side; the authors have 3.
MAX_BASE_TILES = 16
#: Operations of a vision graph for one tile; those of the largest towers have 10^13.
MAX_FLOPS = 1 << 48
#: Bytes of tokens float32 of one tile.
MAX_TILE_TOKENS = 1 << 30
#: Characters of the prompt before and after the image; the longest template we know has 200.
MAX_TEMPLATE = 4096
#: Parts of a prompt's layout.
MAX_PARTS = 64
MAX_STOPS = 64
#: Labels of a detector, characters of each, cells along a tile's side.
MAX_LABELS, MAX_LABEL, MAX_CELLS = 256, 64, 256
MAX_ALIASES = 16
MAX_STOP_TEXT = 256
MAX_FILES = 4096
MAX_NAME = 1024
#: Graphs of one stage, and engines that one was written for.
MAX_GRAPHS = 64


def check_limits(path: Path, manifest: Manifest) -> None:
    """Check everything that can be checked without the other files.

    Args:
        path: Of the manifest, for the message.
        manifest: As it was read.

    Raises:
        BundleError: A value is out of bounds, or values do not fit together; it names the first.
    """
    problem = next(_problems(manifest), "")
    if problem:
        raise BundleError(f"{path} holds values that do not fit together: {problem}; export again")


def _problems(manifest: Manifest) -> Iterator[str]:
    yield from _texts(manifest)
    yield from _vision(manifest.vision)
    for name, spec in (("rfm", manifest.rfm), ("llm", manifest.llm)):
        if spec is not None:
            yield from _decoder(name, spec)
    yield from _together(manifest)
    yield from _prompt(manifest.prompt, manifest.llm.vocabulary)
    if manifest.calibration is not None:
        yield from calibration_problems(manifest.calibration, manifest.llm.vocabulary)


def _within(name: str, value: float, low: float, high: float) -> Iterator[str]:
    # Not a number compares as false.
    if not low <= value <= high:
        yield f"{name} must be {low:g}..{high:g}"


def _texts(manifest: Manifest) -> Iterator[str]:
    if len(manifest.files) > MAX_FILES:
        yield f"files must be at most {MAX_FILES}"
    texts = [manifest.name, manifest.family, manifest.licence, manifest.source.name]
    texts += [*manifest.files, *manifest.tools, *manifest.tools.values(), *_measured(manifest)]
    if any(len(text) > MAX_NAME for text in texts):
        yield f"names must have at most {MAX_NAME} characters"


def _measured(manifest: Manifest) -> Iterator[str]:
    """Texts of what was measured."""
    report = manifest.parity
    yield report.images or ""
    for stage in report.stages:
        yield from (stage.stage, stage.precision or "")
        yield from (figure.measure for figure in stage.figures)
    for name, linears in report.kept_higher.items():
        yield from (name, *linears)
    for choice in report.choices:
        yield from (choice.stage, choice.precision)
    if report.accuracy is not None:
        yield from (report.accuracy.dataset, report.accuracy.matching)


def _graphs(name: str, stage: StageSpec) -> Iterator[str]:
    if not 1 <= len(stage.graphs) <= MAX_GRAPHS:
        yield f"{name}.graphs must be 1..{MAX_GRAPHS}"
    known = set()
    for file in stage.graphs:
        if any(len(text) > MAX_NAME for text in (file.path, file.flavour, *file.engines)):
            yield f"{name}.graphs: names must have at most {MAX_NAME} characters"
        if not 1 <= len(file.engines) <= MAX_GRAPHS:
            yield f"{name}.graphs must name 1..{MAX_GRAPHS} engines each"
        for engine in file.engines:
            if (file.flavour, engine) in known:
                yield f"{name}.graphs must be one for each flavour and engine"
            known.add((file.flavour, engine))


def _vision(vision: VisionSpec) -> Iterator[str]:
    yield from _graphs("vision", vision)
    yield from _within("vision.tile", vision.tile, MIN_TILE, MAX_TILE)
    yield from _within("vision.grid", vision.grid, 1, vision.tile)
    yield from _within("vision.local_pool", vision.local_pool, 1, vision.grid)
    if vision.pooling == "mean" and vision.grid % vision.local_pool:
        yield "vision.local_pool must divide vision.grid where vision.pooling is mean"
    yield from _within("vision.positions", vision.positions, 0, MAX_POSITIONS)
    for value in vision.mean:
        yield from _within("vision.mean", value, -100, 100)
    for value in vision.std:
        yield from _within("vision.std", value, 1e-6, 1e6)
    counted = [vision.flops]
    if vision.tower is not None:
        counted += [vision.tower.flops, vision.tower.projector_flops]
    for value in counted:
        yield from _within("vision.flops", value, 0, MAX_FLOPS)
    if vision.objects is not None:
        yield from _objects(vision.objects)


def _objects(spec: ObjectSpec) -> Iterator[str]:
    yield from _within("labels of vision.objects", len(spec.labels), 1, MAX_LABELS)
    for label in spec.labels:
        # Labels stand in the prompt, between commas and lines.
        if not 1 <= len(label) <= MAX_LABEL or not label.isprintable() or label != label.strip():
            yield (
                f"labels of vision.objects must have 1..{MAX_LABEL} printable characters, none "
                "with spaces around it"
            )
    if len(set(spec.labels)) != len(spec.labels):
        yield "vision.objects must name no label twice"
    if spec.aliases and len(spec.aliases) != len(spec.labels):
        yield "aliases of vision.objects must be one list for each label, or none at all"
    for words in spec.aliases:
        yield from _within("aliases of a label of vision.objects", len(words), 0, MAX_ALIASES)
        if not all(1 <= len(word) <= MAX_LABEL for word in words):
            yield f"aliases of vision.objects must have 1..{MAX_LABEL} characters"
    yield from _within("vision.objects.grid", spec.grid, 1, MAX_CELLS)
    if len(spec.thresholds) != len(spec.labels):
        yield "thresholds of vision.objects must be one pair for each label"
    # Not a number compares as false.
    if not all(0 <= low <= high <= 1 for low, high in spec.thresholds):
        yield "thresholds of vision.objects must be 0..1, the first at most the second"


def _decoder(name: str, spec: DecoderSpec) -> Iterator[str]:
    yield from _graphs(name, spec)
    yield from _within(f"{name}.layers", spec.layers, 1, MAX_LAYERS)
    yield from _within(f"{name}.heads", spec.heads, 1, MAX_HEADS)
    yield from _within(f"{name}.kv_heads", spec.kv_heads, 1, spec.heads)
    yield from _within(f"{name}.head_dim", spec.head_dim, 1, MAX_WIDTH)
    yield from _within(f"{name}.hidden", spec.hidden, 1, MAX_WIDTH)
    yield from _within(f"{name}.heads times head_dim", spec.heads * spec.head_dim, 1, MAX_WIDTH)
    yield from _within(f"{name}.intermediate", spec.intermediate, 0, MAX_INTERMEDIATE)
    if spec.heads % spec.kv_heads:
        yield f"{name}.kv_heads must divide {name}.heads"
    yield from _within(f"{name}.deepstack", spec.deepstack, 0, MAX_DEEPSTACK)


def _together(manifest: Manifest) -> Iterator[str]:
    vision, llm, limits = manifest.vision, manifest.llm, manifest.limits
    yield from _within("llm.vocabulary", llm.vocabulary, 1, MAX_TOKENS)
    yield from _region_focus(manifest.rfm, llm)
    if vision.grid**2 * llm.width * 4 > MAX_TILE_TOKENS:
        yield "vision.grid is too large for llm.hidden"
    end = 0
    for segment in llm.segments:
        if segment.first_layer != end or segment.layers < 1:
            end = -1
            break
        end += segment.layers
    if end not in (0, llm.layers):
        yield "llm.segments must be all layers, each once and in order"
    if llm.deepstack > min([llm.layers, *(segment.layers for segment in llm.segments[:1])]):
        yield "llm.deepstack must be at most the layers of the llm, and of its first segment"
    if manifest.prompt.position_axes > 1 and (vision.positions or vision.tower is not None):
        yield "prompt.position_axes must be 1 with vision.positions or vision.tower"
    if (vision.objects is None) != (manifest.prompt.objects is None):
        yield "vision.objects and an objects part of prompt.parts must be there both, or neither"
    search = manifest.search
    yield from _within(
        "search.base_side", search.base_side, vision.tile, MAX_BASE_TILES * vision.tile
    )
    yield from _within("search.keep_ratio", search.keep_ratio, 1e-6, 1)
    if len(search.relative_to) > MAX_TEMPLATE:
        yield f"search.relative_to must have at most {MAX_TEMPLATE} characters"
    yield from _within("limits.max_length", limits.max_length, vision.grid**2 + 1, MAX_TOKENS)
    yield from _within("limits.max_positions", limits.max_positions, 1, MAX_TOKENS)
    yield from _within("repetition_penalty", manifest.repetition_penalty, 0.01, 100)
    yield from _tokens("penalised_ids", manifest.penalised_ids, llm.vocabulary)


def _region_focus(rfm: DecoderSpec | None, llm: DecoderSpec) -> Iterator[str]:
    """What an RFM must have in common with the language model."""
    if rfm is not None and rfm.hidden != llm.hidden:
        yield "rfm.hidden must be llm.hidden"
    if rfm is not None and rfm.deepstack != llm.deepstack:
        yield "rfm.deepstack must be llm.deepstack"
    if not any(file.flavour == Flavour.GQA_REST for file in llm.graphs):
        return
    if rfm is None or not 1 <= rfm.layers < llm.layers:
        yield f"llm.graphs has {Flavour.GQA_REST}, so rfm must be its first layers"
        return
    for name in ("heads", "kv_heads", "head_dim", "intermediate", "floats", "precision"):
        if getattr(rfm, name) != getattr(llm, name):
            yield f"llm.graphs has {Flavour.GQA_REST}, so rfm.{name} must be llm.{name}"


def _tokens(name: str, ids: tuple[int, ...], vocabulary: int) -> Iterator[str]:
    if len(ids) > MAX_STOPS:
        yield f"{name} must be at most {MAX_STOPS}"
    for token in ids:
        yield from _within(name, token, 0, vocabulary - 1)


def _view_is_last(prompt: PromptSpec) -> bool:
    return prompt.view_place > prompt.local_place


def _prompt(prompt: PromptSpec, vocabulary: int) -> Iterator[str]:
    if len(prompt.parts) > MAX_PARTS:
        yield f"prompt.parts must be at most {MAX_PARTS}"
    if problem := problems(prompt.parts):
        yield f"prompt.parts {problem}"
    for part in prompt.parts:
        texts = [part.text] if isinstance(part, Text | Objects | Question) else []
        if isinstance(part, LocalRows | LocalTiles):
            texts = [part.before, part.after]
        if isinstance(part, LocalTiles):
            texts += [part.row, part.end]
            yield from _within("most of local_tiles", part.most, 0, MAX_BASE_TILES)
        if any(len(text) > MAX_TEMPLATE for text in texts):
            yield f"texts of prompt.parts must have at most {MAX_TEMPLATE} characters each"
        if isinstance(part, TokenIds | Separator):
            yield from _tokens("ids of prompt.parts", part.ids, vocabulary)
    yield from _axes(prompt)
    yield from _tokens("prompt.stop_ids", prompt.stop_ids, vocabulary)
    if len(prompt.stop_texts) > MAX_STOPS:
        yield f"prompt.stop_texts must be at most {MAX_STOPS}"
    texts = [*prompt.stop_texts, prompt.image_token]
    if "" in prompt.stop_texts or any(len(text) > MAX_STOP_TEXT for text in texts):
        yield f"prompt.stop_texts and image_token must have 1..{MAX_STOP_TEXT} characters each"


def _axes(prompt: PromptSpec) -> Iterator[str]:
    if prompt.position_axes not in POSITION_AXES:
        yield "prompt.position_axes must be 1 or 3: this lrs-edge builds no other sequences"
    rows = [part for part in prompt.parts if isinstance(part, LocalRows)]
    if prompt.position_axes > 1 and problems(prompt.parts) == "" and _view_is_last(prompt):
        yield "prompt.parts must have their global_view first where position_axes is 3"
    if prompt.position_axes > 1 and any(part.newline for part in rows):
        yield "prompt.parts must have no newline in local_rows where position_axes is 3"
