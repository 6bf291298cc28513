"""The nano model in plain torch: projector, LLaMA layers, and the RFM's scoring.

Attention takes an explicit mask and explicit positions, so that one sequence may hold several
questions that share an image prefix (see `sequences.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from common import FEATURES, POSITIONS
from torch import Tensor, nn
from torch.nn import functional


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


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and weighted, float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rope(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, T, head_dim] for positions [B, T]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = positions.float()[..., None] * (config.rope_theta**-half)
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half layout."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(self.heads * width, config.hidden_size, bias=False)

    def queries_keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, heads, T, d] and keys repeated to all heads."""
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, -1).transpose(1, 2), cos, sin)
        return q, k.repeat_interleave(self.heads // self.kv_heads, 1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Causal (or masked) self-attention over [B, T, hidden]."""
        b, t, _ = x.shape
        q, k = self.queries_keys(x, cos, sin)
        v = self.v_proj(x).view(b, t, self.kv_heads, -1).transpose(1, 2)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        if mask is not None:
            mask = mask.to(q.dtype)
        mixed = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Feed-forward part."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Attention and feed-forward, each added to its input."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        cos, sin = rope(positions, self.config)
        found = [x]
        for layer in list(self.layers)[first:layers]:
            x = layer(x, cos, sin, mask)
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
    """Vision features to the language model's width."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp_projector = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Vision tokens in the language model's input space."""
        return self.mlp_projector(features)


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
