"""The nano model in plain torch: projector, positions, and the exporter's decoder layers.

Attention takes an explicit mask and explicit positions, so that one sequence may hold several
questions that share an image prefix (see `sequences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import FEATURES, POSITIONS
from torch import Tensor, nn
from torch.nn import functional
from tower import WIDTH
from words import WORDS

from lrs_edge_export.checkpoints.model import DecoderConfig
from lrs_edge_export.torch_model import decoder
from lrs_edge_export.torch_model.decoder import Rope


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the language model; the defaults are SmolLM2-135M's, cut."""

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 5
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    vocab_size: int = 4096

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def decoder(self) -> DecoderConfig:
        """The sizes as the exporter names them."""
        return DecoderConfig(
            layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate_size,
            eps=self.rms_norm_eps,
            theta=self.rope_theta,
            qkv_bias=False,
        )


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and weighted, float32."""
        return decoder.rms_norm(x, self.weight, self.eps)


class Layer(nn.Module):
    """The weights of one decoder layer, by the names of checkpoints; run by `torch_model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.decoder
        hidden, wide, width = config.hidden_size, config.intermediate_size, config.head_dim
        inner, narrow = width * config.num_attention_heads, width * config.num_key_value_heads
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(hidden, inner, bias=False),
            "k_proj": nn.Linear(hidden, narrow, bias=False),
            "v_proj": nn.Linear(hidden, narrow, bias=False),
            "o_proj": nn.Linear(inner, hidden, bias=False),
        })  # fmt: skip
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(hidden, wide, bias=False),
            "up_proj": nn.Linear(hidden, wide, bias=False),
            "down_proj": nn.Linear(wide, hidden, bias=False),
        })  # fmt: skip

    def queries_keys(self, x: Tensor, turns: Rope) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, heads, T, d] and keys repeated to all heads, of the layer's input."""
        weights, normed = dict(self.named_parameters()), self.input_layernorm(x)
        query = decoder.rotated_heads(self.config, weights, "q", normed, turns)
        key = decoder.rotated_heads(self.config, weights, "k", normed, turns)
        return query, decoder.to_all_heads(key, self.config.heads)

    def forward(self, x: Tensor, turns: Rope, mask: Tensor | None) -> Tensor:
        """Attention (causal without a mask) and feed-forward, each added to [B, T, hidden]."""
        attend = decoder.causal if mask is None else decoder.masked(mask)
        weights = dict(self.named_parameters())
        return decoder.decoder_layer(self.config, weights, x, turns, attend)


class LanguageModel(nn.Module):
    """Token embeddings, decoder layers, final norm; the head is the embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def states(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        layers: int | None = None,
        first: int = 0,
    ) -> list[Tensor]:
        """Hidden states before layer `first`, the next, ... and after the last one that is run."""
        if positions is None:
            positions = torch.arange(x.shape[1])[None]
        turns = decoder.rope(self.config.decoder, positions)
        found = [x]
        for layer in list(self.layers)[first:layers]:
            x = layer(x, turns, mask)
            found.append(x)
        return found

    def forward(
        self, x: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Final hidden states, normalised."""
        return self.norm(self.states(x, positions, mask)[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary."""
        return functional.linear(hidden, self.embed_tokens.weight)


class Projector(nn.Module):
    """Vision tokens to the language model's width: features through an MLP, context and words."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp_projector = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.neck = nn.Linear(WIDTH + len(WORDS), hidden, bias=False)
        nn.init.zeros_(self.neck.weight)

    @torch.no_grad()
    def start_from_words(self, embeddings: Tensor, share: float = 1.5) -> None:
        """Let a token that shows a word carry that word's embedding.

        Args:
            embeddings: [K, hidden], of the words in the order of `words.WORDS`.
            share: Their factor at a probability of 1 (which is stored as 6).
        """
        self.neck.weight[:, WIDTH:] = share / 6 * embeddings.T

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., 1280 + 192 + K] in the language model's input space."""
        return self.mlp_projector(tokens[..., :FEATURES]) + self.neck(tokens[..., FEATURES:])


class ImagePosition(nn.Module):
    """Embeddings of image rows and columns, as `lrs_edge.vision.positions` adds them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(POSITIONS, hidden) * 0.01)
        self.cols = nn.Parameter(torch.randn(POSITIONS, hidden) * 0.01)

    @torch.no_grad()
    def start_from_words(self, words: dict[str, Tensor], share: float = 4.0) -> None:
        """Add the embeddings of the words for the image's edges, fading to nothing in its middle.

        A language model with tied embeddings can then read off an attended token where it lies.

        Args:
            words: Embeddings [hidden] of top, bottom, left and right.
            share: Their factor at the edges.
        """
        places = torch.linspace(-1, 1, POSITIONS)
        strength = share * ((places.abs() - 0.2) / 0.6).clamp(0, 1)[:, None]
        first = (places < 0)[:, None]
        self.rows += strength * torch.where(first, words["top"], words["bottom"])
        self.cols += strength * torch.where(first, words["left"], words["right"])

    def forward(self, centres: Tensor) -> Tensor:
        """Embeddings [n, hidden] of token centres [n, 2], (y, x) in shares of the picture."""
        places = centres.clamp(0, 1) * (POSITIONS - 1)
        below = places.long().clamp(max=POSITIONS - 2)
        weight = places - below
        found = torch.zeros(len(centres), self.rows.shape[1])
        for axis, table in enumerate((self.rows, self.cols)):
            low, share = below[:, axis], weight[:, axis, None]
            found = found + table[low] * (1 - share) + table[low + 1] * share
        return found


class Nano(nn.Module):
    """Projector, positions, newline vector and language model: everything that is trained."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.llm = LanguageModel(config)
        self.projector = Projector(config.hidden_size)
        self.position = ImagePosition(config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * 0.05)
