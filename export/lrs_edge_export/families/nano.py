"""Family `nano`: the embedded model, efficientnet-lite0 with a small LLaMA decoder.

Everything that other families fix by convention stands in its config.json: normalisation, prompt,
separator, base side, token grid. Optional there: `position_entries` (rows of the position tables),
`vision_neck` (`width`, `words`, `low`: `VisionNeck`), `vision_objects` on top of it (`width`,
`labels`, `thresholds`: `ObjectHead`; what it finds is said in the prompt), and `rfm_from_llm`
(LAYERS of `lrs-edge export --rfm from-llm:LAYERS`, for a checkpoint without a region focus module).
"""

from __future__ import annotations

from functools import partial

from lrs_edge.bundle.layout import PromptSpec, rows_layout
from lrs_edge.bundle.limits import MAX_ALIASES, MAX_LABEL, MAX_LABELS
from lrs_edge.bundle.manifest import Limits
from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.tokenizer_json import TokenizerFile, copied
from lrs_edge_export.checkpoints.checkpoint import Checkpoint, Settings
from lrs_edge_export.checkpoints.model import DecoderStage, Model, PositionTables, check_vocabulary
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.rows import first_rows
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import (
    EfficientNetTower,
    ObjectHead,
    VisionNeck,
    VisionStage,
)
from lrs_edge_export.families.family import Family
from lrs_edge_export.families.parts import (
    MAX_TILE,
    MAX_TOKENS,
    MAX_WIDTH,
    decoder_config,
    region_focus,
    repetition,
    stop_ids,
)
from lrs_edge_export.families.scoring import ScoringLayer

_TOWER = "efficientnet-lite0"
_STRIDE = 32
_NECK = "model.vision_neck."
_OBJECTS = "model.vision_objects."
#: Channels that the neck makes of the finer map, where config.json does not say.
_LOW = 160
#: How the prompt says what an object head found.
_SEEN = "\nSeen: {objects}"
_MAX_POSITIONS = 1 << 12
#: Channels of either part of an object head, at most: a tile's maps are in memory.
_MAX_OBJECT_WIDTH = 512


def read(checkpoint: Checkpoint, vision_tower: str | None) -> Model:
    """Read a checkpoint. Raises ExportError."""
    if vision_tower is not None:
        raise ExportError("--vision-tower does not apply: this checkpoint holds its own tower")
    config, generation = checkpoint.config, checkpoint.side_file("generation_config.json")
    weights = checkpoint.tensors()
    decoder = decoder_config(config, qkv_bias=False)
    inner = Scoped(weights, "model.")
    check_vocabulary(inner, config.integer("vocab_size", 1, MAX_TOKENS))
    tokenizer = copied(checkpoint.path / "tokenizer.json")
    vocabulary = tokenizer.length
    tied = config.flag("tie_word_embeddings")
    head = (inner, "embed_tokens.weight") if tied else (weights, "lm_head.weight")
    inner.require({"image_newline": (decoder.hidden,)}, "newline vector")
    longest = config.integer("tokenizer_model_max_length", 1, MAX_TOKENS)
    suffix = config.text("prompt_suffix")
    if "{question}" not in suffix:
        raise config.wrong("prompt_suffix", "must contain {question}")
    vision = _vision(config, weights, decoder.hidden)
    if vision.objects is not None:
        _refuse_control_tokens(config, vision.objects.labels, tokenizer)
    layout = rows_layout(
        config.text("prompt_prefix"),
        suffix,
        separator_id=tokenizer.id_of(config.text("separator")),
        objects=None if vision.objects is None else _SEEN,
    )
    model = Model(
        family="nano",
        vision=vision,
        rfm=region_focus(config, decoder, weights),
        llm=DecoderStage(decoder, inner),
        embed_tokens=first_rows(inner, "embed_tokens.weight", vocabulary, decoder.hidden),
        lm_head=first_rows(*head, vocabulary, decoder.hidden),
        image_newline=lambda: inner.read("image_newline"),
        vocabulary=vocabulary,
        tokenizer_json=tokenizer.text,
        prompt=PromptSpec(layout, stop_ids(config, generation, vocabulary)),
        base_side=config.integer("base_side", 1, MAX_TILE),
        limits=Limits(max_length=longest, max_positions=longest),
        repetition=repetition(config, generation, vocabulary),
        folders=(checkpoint.path,),
        positions=_positions(config, inner, decoder.hidden),
    )
    # As `--rfm from-llm:LAYERS`, for a checkpoint whose language model was trained to score. An RFM
    # of its own comes first: `lrs-edge distill` adds one to such a checkpoint.
    layers = config.integer("rfm_from_llm", 0, decoder.layers - 1, default=0)
    return model.with_rfm_of_llm(layers) if model.rfm is None and layers else model


#: Its language model is trained to look at evidence there (docs/distill.md, "Which layer scores").
_SCORING = ScoringLayer(2, 5, "layer 2 of the embedded model's 5, docs/distill.md")

FAMILY = Family("nano", ("LrsEdgeNanoForCausalLM",), "the embedded model", read, scoring=_SCORING)


def _positions(config: Settings, weights: Scoped, hidden: int) -> PositionTables | None:
    entries = config.integer("position_entries", 0, _MAX_POSITIONS, default=0)
    if not entries:
        return None
    names = ("vision_position.rows", "vision_position.cols")
    weights.require(dict.fromkeys(names, (entries, hidden)), "position embeddings")
    return PositionTables(entries, *(partial(weights.read, name) for name in names))


def _vision(config: Settings, weights: Scoped, hidden: int) -> VisionStage:
    if config.text("mm_vision_tower") != _TOWER:
        raise config.wrong("mm_vision_tower", f"must be {_TOWER}")
    tile = config.integer("slice_block_size", _STRIDE, MAX_TILE)
    grid = config.integer("token_grid", 1, MAX_TILE)
    if grid * _STRIDE != tile:
        raise config.wrong("token_grid", f"must be a {_STRIDE}th of slice_block_size {tile}")
    pool = config.integer("local_pool", 1, grid)
    if grid % pool:
        raise config.wrong("local_pool", f"must divide the {grid} tokens along a tile's side")
    return VisionStage(
        tower=EfficientNetTower(
            Scoped(weights, "model.vision_tower."), grid, _neck(config, weights)
        ),
        projector=Projector(Scoped(weights, "model.mm_projector.mlp_projector.")),
        width=EfficientNetTower.features,
        hidden=hidden,
        tile=tile,
        local_pool=pool,
        mean=config.triple("image_mean"),
        std=config.triple("image_std"),
    )


def _neck(config: Settings, weights: Scoped) -> VisionNeck | None:
    tensors = Scoped(weights, _NECK)
    described = config.section("vision_neck")
    objects = _objects(config, weights)
    if described is None:
        if tensors.names():
            raise config.wrong("vision_neck", f"must describe the weights {_NECK}*")
        if objects is not None:
            raise config.wrong("vision_neck", "must be there where there are vision_objects")
        return None
    return VisionNeck(
        tensors,
        objects=objects,
        projection=Scoped(weights, "model.mm_projector.neck."),
        width=described.integer("width", 1, MAX_WIDTH),
        low=described.integer("low", 1, MAX_WIDTH, default=_LOW),
        words=described.integer("words", 1, MAX_WIDTH),
    )


def _objects(config: Settings, weights: Scoped) -> ObjectHead | None:
    tensors = Scoped(weights, _OBJECTS)
    described = config.section("vision_objects")
    if described is None:
        if tensors.names():
            raise config.wrong("vision_objects", f"must describe the weights {_OBJECTS}*")
        return None
    labels = _labels(described)
    return ObjectHead(
        tensors,
        width=described.integer("width", 1, _MAX_OBJECT_WIDTH),
        labels=labels,
        thresholds=_thresholds(described, len(labels)),
        aliases=_aliases(described, len(labels)),
    )


def _labels(described: Settings) -> tuple[str, ...]:
    """Names of labels, which are said in the prompt. Raises ExportError."""
    found = described.values.get("labels")
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_LABELS:
        raise described.wrong("labels", f"must be a list of 1..{MAX_LABELS} labels")
    for label in found:
        sound = isinstance(label, str) and 1 <= len(label) <= MAX_LABEL
        if not sound or not label.isprintable() or label != label.strip():
            raise described.wrong(
                "labels",
                f"must have labels of 1..{MAX_LABEL} printable characters, none with spaces "
                "around it",
            )
    if len(set(found)) != len(found):
        raise described.wrong("labels", "must name no label twice")
    return tuple(found)


def _refuse_control_tokens(
    config: Settings, labels: tuple[str, ...], tokenizer: TokenizerFile
) -> None:
    """No bundle may have labels that are more than words in a prompt. Raises ExportError."""
    added = tokenizer.tokenizer.get_added_tokens_decoder().values()
    for control in (token.content for token in added if token.special):
        if any(control in label for label in labels):
            rule = f"must have labels without the tokenizer's control token {control!r}"
            described = config.section("vision_objects")
            assert described is not None
            raise described.wrong("labels", rule)


def _aliases(described: Settings, count: int) -> tuple[tuple[str, ...], ...]:
    """Other words for each label, where there are any. Raises ExportError."""
    found = described.values.get("aliases", [])
    rule = f"must be a list of at most {MAX_ALIASES} words for each label"
    if not isinstance(found, list) or len(found) not in (0, count):
        raise described.wrong("aliases", rule)
    for words in found:
        if not isinstance(words, list) or len(words) > MAX_ALIASES:
            raise described.wrong("aliases", rule)
        if not all(isinstance(word, str) and 1 <= len(word) <= MAX_LABEL for word in words):
            raise described.wrong("aliases", f"must have words of 1..{MAX_LABEL} characters")
    return tuple(tuple(words) for words in found)


def _thresholds(described: Settings, count: int) -> tuple[tuple[float, float], ...]:
    """Two scores per label, from which objects are doubtful and sure. Raises ExportError."""
    found = described.values.get("thresholds")
    rule = "must be a list of [low, high] for each label, 0 <= low <= high <= 1"
    if not isinstance(found, list) or len(found) != count:
        raise described.wrong("thresholds", rule)
    pairs = []
    for pair in found:
        if not isinstance(pair, list) or len(pair) != 2:
            raise described.wrong("thresholds", rule)
        # Not a number compares as false.
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in pair) or not (
            0 <= pair[0] <= pair[1] <= 1
        ):
            raise described.wrong("thresholds", rule)
        pairs.append((float(pair[0]), float(pair[1])))
    return tuple(pairs)
