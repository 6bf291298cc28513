"""Schema of a bundle's `manifest.json`.

One frozen struct per part; `bundle.py` reads and verifies, `lrs_edge_export` writes; manifests of
version 1 are read by `version1.py`. Fields without a default are those that every bundle has to
state; a default here means that the part is absent.

A stage (vision, rfm, llm) has one graph file for each *flavour* that it was written in, and all of
them share the stage's weight file. The flavour says how a graph is written, and so which engines
can run it (`GraphFile`); an engine takes the first flavour of its own list that a stage has
(`lrs_edge/engines/placement.py`). A runtime leaves flavours and engines that it does not know
alone. Today's:

    plain        vision: operators of the ONNX standard alone
    fused        vision: `plain` by onnxruntime's own operators, of transformers, for CUDA
    gqa          rfm, llm: GroupQueryAttention over shared buffers, positions in input 9
    masked       rfm: products and softmax written out, with an attention bias, over shared buffers
    gqa-int8-kv  llm: `gqa` over key/value buffers of int8, one scale per channel
    gqa-rest     llm: what follows an rfm that is its first layers

Graphs of one stage have the same inputs and outputs for every model family:

    vision   pixel_values [N, 3, S, S] float32 (normalised)   -> tokens [N, T, W] float32,
             objects [N, C + 2, G, G] float32 where `VisionSpec.objects` says so
    rfm      inputs_embeds [1, L, W], position_ids [k, L], past_length [1],
             past_key_0, past_value_0 .. past_key_{n-1}, past_value_{n-1}, past_key_n
             -> logits [H, past_length + L], present_* as past_*
    llm      inputs_embeds [1, L, W], position_ids [k, L], past_length [1],
             past_key_0, past_value_0 .. past_key_{n-1}, past_value_{n-1}
             -> logits [1, V], present_* as past_*

k is `PromptSpec.position_axes`. W is the width D of the embeddings, or, where the first n layers
add something to vision tokens (`DecoderSpec.deepstack`), (1 + n) * D: after the embedding what is
added after layer 0, after layer 1, ...; of text that is zeros, which no file holds.

A graph `gqa`, `gqa-int8-kv` or `gqa-rest` of `llm` that was written for CUDA has one input more,
total_length [1] int32: past_length + L, or any number up to S that is not less. onnxruntime reads
it on the host and all other inputs on the device, and copies nothing in between, so that a run of
one token can be captured as a CUDA graph, with S as total_length.

`past_*` and `present_*` are buffers [1, kv_heads, S, head_dim] of which the first `past_length`
places are filled; the graph writes the L new keys (after RoPE) and values after them. Both may be
the same memory. `rfm` scores at layer n, of which only the keys exist. The `masked` flavour of
`rfm` has one input more, attention_bias [1, 1, L, past_length + L], added to the attention logits
of layers 0..n-1.

An `rfm` that is the language model's first layers runs the attention of layer n, too: it has the
buffers past_value_n and present_value_n besides, and in flavour `gqa` the outputs

             hidden_states [1, L, W]   after layer n-1, with what inputs_embeds has beside them
             attended [1, L, H d]      what the heads of layer n read

The flavour `gqa-rest` of `llm` goes on from there: hidden_states as inputs_embeds, attended, and
the buffers of layers n+1 on. So both stages together hold every weight once, and the language
model's keys and values of layers 0..n are the region focus module's.

`llm` may also come cut into segments of consecutive layers a..b-1 (`DecoderSpec.segments`), for
ways to prune that drop tokens between layers. A segment has the buffers of its layers only, and
takes the embeddings, or the hidden states [1, L, D] of the segment before it, as inputs_embeds. The
last one gives logits, every other

             hidden_states [1, L, D]
             attention [H, past_length + L]       of the last token to all, at layer b-1
             next_attention [H, past_length + L]  the same at layer b, whose keys it also holds
                                                  (past_key_b, present_key_b)

as scaled query-key products before the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from lrs_edge.bundle.calibration import Calibration
from lrs_edge.bundle.layout import PromptSpec
from lrs_edge.bundle.parity import ParityReport
from lrs_edge.errors import BundleError

#: Version of the layout below.
SCHEMA_VERSION = 2

#: A manifest longer than this is refused unread.
MAX_MANIFEST_BYTES = 1 << 20


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the bundle: what it is, its size in bytes and its SHA-256 in hex."""

    role: str
    size: int
    sha256: str


class Source(msgspec.Struct, frozen=True):
    """Where the weights come from: a name, and the SHA-256 over all checkpoint files."""

    name: str
    sha256: str


#: The engine that runs all flavours of today; see `lrs_edge/engines/placement.py`.
ONNXRUNTIME = "onnxruntime"


class Flavour:
    """Names of the flavours that are described above."""

    PLAIN = "plain"
    FUSED = "fused"
    GQA = "gqa"
    MASKED = "masked"
    GQA_INT8_KV = "gqa-int8-kv"
    GQA_REST = "gqa-rest"


class GraphFile(msgspec.Struct, frozen=True):
    """One ONNX file of a stage: its path, its flavour, and the engines that it was written for."""

    path: str
    flavour: str
    engines: tuple[str, ...] = (ONNXRUNTIME,)


class StageSpec(msgspec.Struct, frozen=True):
    """What all stages have.

    Attributes:
        graphs: One file per flavour, which share the weights.
        precision: How weights are stored and products computed, such as `fp32`, `int8-dynamic` or
            `int4-weight` (`lrs_edge_export.quantization.precision`).
    """

    graphs: tuple[GraphFile, ...]
    precision: str

    def has(self, flavour: str, engine: str = ONNXRUNTIME) -> bool:
        """Whether there is a file of this flavour for an engine."""
        return any(self._matching(flavour, engine))

    def path(self, flavour: str, engine: str = ONNXRUNTIME) -> str:
        """Path of the file of this flavour for an engine.

        Raises:
            BundleError: There is none.
        """
        for path in self._matching(flavour, engine):
            return path
        found = ", ".join(f"{file.path} ({file.flavour})" for file in self.graphs)
        raise BundleError(
            f"the bundle has no graph of flavour {flavour} for {engine}, only {found}; export it "
            "again"
        )

    def _matching(self, flavour: str, engine: str) -> Iterator[str]:
        return (f.path for f in self.graphs if f.flavour == flavour and engine in f.engines)


class TowerSpec(msgspec.Struct, frozen=True):
    """The vision encoder in two graphs, for ways to prune that choose tokens between them.

    Attributes:
        graph: Path of the CLIP tower, pixel_values [N, 3, S, S] ->
            features [N, T, W], what the projector takes;
            cls_attention [N, T], of the class token to the patches in the last layer that is run,
            after the softmax, mean over heads;
            keys [N, T, d], of the patches in the same layer, mean over heads;
            next_cls_attention [N, T] and next_keys [N, T, W], the same in the layer after it, all
            heads taken as one of width W.
        projector: Path of the projector, features [N, M, W] -> tokens [N, M, D].
        flops: Floating-point operations of the tower for one tile; 0 where they were not counted.
        projector_flops: Of the projector for one token.
    """

    graph: str
    projector: str
    flops: int = 0
    projector_flops: int = 0


class ObjectSpec(msgspec.Struct, frozen=True):
    """The vision graph's detector, whose output is `objects` float32 [N, C + 2, G, G].

    The first C maps are the probability that an object of a label has its centre in the cell, the
    last two log2 of its box's width and height in cells (`lrs_edge.objects`).

    Attributes:
        labels: Names of the C labels.
        grid: Cells G along a tile's side.
        thresholds: Two scores per label: from the first an object counts as doubtful, from the
            second as sure.
        aliases: Other words for each label by which a question may name it, in the singular; empty
            for none at all. A question that names labels is told of those alone.
    """

    labels: tuple[str, ...]
    grid: int
    thresholds: tuple[tuple[float, float], ...]
    aliases: tuple[tuple[str, ...], ...] = ()


class VisionSpec(StageSpec, frozen=True):
    """Vision encoder with projector.

    Attributes:
        tile: Tile side S in pixels.
        grid: Tokens along a tile's side, T = grid * grid.
        local_pool: Local tiles have this many times fewer tokens along a side, rounded up; the
            global view is given whole.
        mean: Per channel, on pixels of 0..1.
        std: Per channel, on pixels of 0..1.
        flops: Floating-point operations of the graph for one tile (a multiplication and an addition
            are two); 0 where the exporter did not count them.
        positions: Entries G of the learned row and column embeddings that are added to tokens by
            their place in the image; 0 where the model has none.
        tower: Tower and projector as graphs of their own (`--vision-attention`), or None.
        objects: The detector beside the tokens, or None.
        stretched: The global view is the image stretched to a square, as LLaVA-NeXT was trained;
            otherwise the image keeps its shape there, and the rest of the tile is empty.
        filter: By which the family's image processor resizes (`--resampling processor`).
        pooling: How local tiles are reduced: by the mean of local_pool x local_pool tokens, of
            which grid must be a multiple; or by bilinear interpolation between token centres, to
            any size (torch's `interpolate` without aligned corners, LLaVA-OneVision's
            `get_2dPool`).
    """

    tile: int
    grid: int
    local_pool: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flops: int
    positions: int = 0
    tower: TowerSpec | None = None
    objects: ObjectSpec | None = None
    stretched: bool = False
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    pooling: Literal["mean", "bilinear"] = "mean"

    @property
    def per_tile(self) -> int:
        """Local tokens along a tile's side, after pooling."""
        return -(-self.grid // self.local_pool)


class SegmentSpec(msgspec.Struct, frozen=True):
    """Consecutive layers of the LLM as a graph of their own: path, first layer, and how many."""

    graph: str
    first_layer: int
    layers: int


class DecoderSpec(StageSpec, frozen=True):
    """Shape of a stack of decoder layers.

    Attributes:
        layers: Full layers n (for the RFM, the scoring layer comes on top).
        heads: Query heads H.
        kv_heads: Key and value heads.
        head_dim: Width of one head in the buffers, zeros behind it included.
        hidden: Width D of the embeddings.
        intermediate: Width of the gated MLP; 0 where the exporter did not note it.
        floats: Type of everything that is not quantized, key/value buffers included. ONNX Runtime's
            attention over such buffers needs `float16` on CUDA.
        vocabulary: Tokens V the logits cover; 0 for the RFM.
        segments: The LLM once more, cut between layers (`--attention-layers`); together they are
            all its layers. Empty where it was exported whole only.
        deepstack: Vectors n of width D that vision tokens have besides their embedding; the first n
            layers each add one to what they give (Qwen3-VL).
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    floats: str
    vocabulary: int = 0
    segments: tuple[SegmentSpec, ...] = ()
    deepstack: int = 0

    @property
    def width(self) -> int:
        """Width W of a token as the graph takes it."""
        return self.hidden * (1 + self.deepstack)


class SearchSpec(msgspec.Struct, frozen=True):
    """Coarse-to-fine search.

    Attributes:
        base_side: Long side of the base level in pixels.
        keep_ratio: Share of tokens kept.
        relative_to: A generic instruction: a token's score is its attention under the question
            divided by that under this text. Empty where scores are the attention itself.
    """

    base_side: int
    keep_ratio: float = 0.25
    relative_to: str = ""


class Limits(msgspec.Struct, frozen=True):
    """Lengths in tokens.

    Attributes:
        max_length: The sequence given to the LLM is never longer (`tokenizer_model_max_length`).
        max_positions: Largest sequence whose positions the RFM was made for; beyond it, gaps of
            tiles that were not selected are closed.
    """

    max_length: int
    max_positions: int


class Manifest(msgspec.Struct, frozen=True):
    """Everything a runtime must know about a bundle. Paths are relative to the bundle."""

    schema_version: int
    name: str
    family: str
    licence: str
    source: Source
    created: str
    tools: dict[str, str]
    files: dict[str, FileEntry]
    vision: VisionSpec
    #: None where the bundle has none.
    rfm: DecoderSpec | None
    llm: DecoderSpec
    prompt: PromptSpec
    search: SearchSpec
    limits: Limits
    embeddings: str
    tokenizer: str
    #: Integer products are right on processors without VNNI, too (`docs/quantization.md`); False in
    #: some bundles of version 1.
    exact_integers: bool
    repetition_penalty: float = 1.0
    #: Tokens that the penalty counts as generated before the first (transformers starts with BOS).
    penalised_ids: tuple[int, ...] = ()
    #: It counts the prompt's tokens, too, as transformers does with a prompt of ids.
    penalise_prompt: bool = False
    parity: ParityReport = ParityReport()
    #: None where answers have no confidence, and yes and no are decided by the logits alone.
    calibration: Calibration | None = None

    @property
    def decoders(self) -> tuple[DecoderSpec, ...]:
        """The RFM, where there is one, and the language model."""
        return (self.llm,) if self.rfm is None else (self.rfm, self.llm)


#: Tensors of the embeddings file: [V, D] and [D], float16 or float32; with `VisionSpec.positions`
#: also two of [G, D].
EMBED_TOKENS = "embed_tokens"
IMAGE_NEWLINE = "image_newline"
POSITION_ROWS, POSITION_COLS = "position_rows", "position_cols"
