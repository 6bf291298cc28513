"""What a model that is not exported yet would take: the arithmetic of `memory.py` over sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrs_edge.bundle.memory import (
    CHUNK,
    FLOAT,
    PROCESS,
    Device,
    Lengths,
    Need,
    Stage,
    attention_bytes,
    held_bytes,
    kept_bytes,
    kv_bytes,
    weights_in_memory,
    workspace_bytes,
)

#: What `lrs-edge export --precision` makes, and the device that its bundle is for: fp16 is made
#: with `--target cuda`, and int4-weight with `--vision int8`, since weights of a vision encoder
#: that are only small in the file are unpacked.
PRECISIONS: Mapping[str, Device] = {
    "fp32": "cpu",
    "int8": "cpu",
    "int4-weight": "cpu",
    "fp16": "cuda",
}

#: Share of a language model's layers that run before the one that scores, where there is no RFM
#: (`lrs_edge_export.families`, layer 14 of 32).
_SCORING = 14 / 32

#: Tiles of the base level.
_BASE_TILES = 9

#: Bytes of a weight on disk, scales included, as `quantization/precision.py` describes them.
_BYTES: Mapping[str, float] = {
    "fp32": 4,
    "fp16": 2,
    "int8-dynamic": 1,
    "int8-weight": 1 + 4 / 128,
    "int4-weight": 1 / 2 + 4 / 32,
}


@dataclass(frozen=True)
class DecoderSize:
    """Shape of a stack of decoder layers; see `manifest.DecoderSpec`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def attention_width(self) -> int:
        """Outputs of query, key and value, and inputs of the output projection."""
        return 2 * self.head_dim * (self.heads + self.kv_heads)

    @property
    def layer(self) -> int:
        """Weights of the matrices of one layer."""
        return self.hidden * (self.attention_width + 3 * self.intermediate)


@dataclass(frozen=True)
class VisionSize:
    """A vision transformer and its projector.

    Attributes:
        patches: Of one tile.
        hidden: Width.
        heads: Attention heads.
        intermediate: Width of the MLP.
        matrices: Weights of matrix products, the projector's among them.
        others: All other weights: patches, positions, norms, biases.
        tokens: That the global view becomes, or a tile.
        local: That a local tile becomes, where they are pooled; 0 where not.
    """

    patches: int
    hidden: int
    heads: int
    intermediate: int
    matrices: int
    others: int
    tokens: int
    local: int = 0


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a checkpoint.

    Attributes:
        name: What it is called.
        vision: Vision encoder and projector.
        llm: The language model's layers.
        vocabulary: Tokens.
        context: Longest sequence that is sensible.
        own_rfm: Layers of a region focus module of its own; 0 where it has none.
        tied: Whether the output projection is the embedding table.
    """

    name: str
    vision: VisionSize
    llm: DecoderSize
    vocabulary: int
    context: int
    own_rfm: int = 0
    tied: bool = False

    @property
    def weights(self) -> int:
        """Weights of the checkpoint, without norms and biases of the language model."""
        tables = self.vocabulary * self.llm.hidden * (1 if self.tied else 2)
        rfm = self.own_rfm * self.llm.layer
        vision = self.vision.matrices + self.vision.others
        return vision + self.llm.layers * self.llm.layer + tables + rfm


def of_sizes(
    size: ModelSize, precision: str, context: int | None = None, rfm_layers: int | None = None
) -> Need:
    """What a model takes once it is exported.

    Args:
        size: Of the model.
        precision: One of `PRECISIONS`, of all stages.
        context: Tokens in the language model's cache; None for as many as are sensible.
        rfm_layers: Layers of the language model that score in place of an RFM; None for as many
            as families have by default. Not looked at where the checkpoint has one of its own.
    """
    device = PRECISIONS[precision]
    tokens = context or size.context
    layers = size.own_rfm or rfm_layers or max(1, round(_SCORING * size.llm.layers))
    rfm = replace(size.llm, layers=layers)
    # A scoring layer of its own has queries and keys alone; of the language model's it is whole.
    scoring = rfm.hidden * rfm.head_dim * (rfm.heads + rfm.kv_heads * (1 if size.own_rfm else 2))
    head = size.vocabulary * size.llm.hidden
    plan = _Plan(precision, device)
    local = size.vision.local or size.vision.tokens
    lengths = Lengths.of(tokens, size.vision.tokens, local, _BASE_TILES)
    focus = plan.decoder("rfm", rfm, scoring, (lengths.base, lengths.level))
    llm = plan.decoder("llm", size.llm, head, (lengths.llm,))
    if not size.own_rfm:
        # Its weights are the language model's, and each is in memory once.
        focus = replace(focus, file=0)
        llm = replace(llm, weights=llm.weights - focus.weights)
    return Need(
        name=size.name,
        device=device,
        context=tokens,
        stages=(
            plan.vision(size.vision, size.llm.hidden),
            focus,
            llm,
        ),
        embeddings=held_bytes(head * (4 if precision == "fp32" else 2)),
        kept=kept_bytes(size.vision.tokens, size.llm.hidden),
        process=PROCESS[device],
    )


@dataclass(frozen=True)
class _Plan:
    """Stages at one precision and context."""

    precision: str
    device: Device

    def vision(self, size: VisionSize, out: int) -> Stage:
        """The vision encoder: the larger of attention and MLP."""
        attention = 2 * size.patches * size.hidden + 2 * size.heads * size.patches**2
        mlp = size.patches * (size.hidden + 2 * size.intermediate)
        numbers = max(attention, mlp, size.patches * size.hidden + size.tokens * out)
        workspace = workspace_bytes(numbers, self.device, tiles=True)
        return self._stage("vision", size.matrices, size.others, 0, workspace)

    def decoder(self, name: str, size: DecoderSize, more: int, caches: tuple[int, ...]) -> Stage:
        """RFM or language model; `more` are the weights on top of its layers."""
        longest = max(caches)
        rows = min(CHUNK, longest)
        scoring = name == "rfm"
        turned = 3 * size.kv_heads * size.head_dim * longest if scoring else 0
        mlp = rows * (2 * size.hidden + 2 * size.intermediate)
        numbers = max(mlp + longest * size.head_dim, turned)
        workspace = workspace_bytes(numbers, self.device)
        workspace += attention_bytes(size, longest, self.device)
        kv = kv_bytes(size, caches, FLOAT[self.device], keys=1 if scoring else 0)
        norms = (2 * size.layers + 1) * size.hidden
        return self._stage(name, size.layers * size.layer + more, norms, kv, workspace)

    def _stage(self, name: str, matrices: int, others: int, kv: int, workspace: int) -> Stage:
        small = self.precision == "int8" or (self.precision, name) == ("int4-weight", "vision")
        precision = "int8-dynamic" if small else self.precision
        file = int(matrices * _BYTES[precision] + others * FLOAT[self.device])
        weights = weights_in_memory(file, name, precision, self.device)
        return Stage(name, precision, file, weights, kv, workspace)
