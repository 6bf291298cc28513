"""One sequence that several questions share, for training.

Everything before a question (prompt, global view, tiles) does not see the question, so questions
about the same tiles share it: the sequence is the image part once, then the text of each question.
A question's text attends to the image part and to itself, never to another question's. Numbers
equal those of one sequence per question (`tests/test_distill_layers.py`).

The layers are those of `torch_model.decoder`: the teacher's come from disk one at a time, the
student's are trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrs_edge_export.checkpoints.model import DecoderConfig
from lrs_edge_export.torch_model import decoder
from lrs_edge_export.torch_model.decoder import LayerWeights, Rope


@dataclass(frozen=True)
class PackedInput:
    """One image part and the questions about it, as the decoder takes them.

    Attributes:
        embeds: float32 [I + S, D]: image part, then the questions' texts one after the other.
        positions: int64 [I + S], or [k, I + S] of k axes, for RoPE; every question starts after
            the image part.
        image: I, tokens of the image part (prompt prefix, global view, separator, local tokens).
        local: First and last + 1 place of the local vision tokens, within the image part.
        lengths: Tokens of each question's text; their sum is S.
    """

    embeds: NDArray[np.float32]
    positions: NDArray[np.int64]
    image: int
    local: tuple[int, int]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """A packed input's geometry on a device, computed once for all layers.

    Attributes:
        turns: Rotations of the positions, float32 [I + S, head_dim].
        image: I.
        local: First and last + 1 place of the local tokens.
        last: int64 [Q], place of each question's last token.
        mask: bool [S, I + S], what the questions' tokens see.
    """

    turns: Rope
    image: int
    local: tuple[int, int]
    last: Tensor
    mask: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixed values [H, I + S, d]: the image part causally, the questions under the mask."""
        image, heads = self.image, len(query)
        key, value = decoder.to_all_heads(key, heads), decoder.to_all_heads(value, heads)
        shown = decoder.causal(query[:, :image], key[:, :image], value[:, :image])
        asked = decoder.attention(query[:, image:], key, value, self.mask)
        return torch.cat((shown, asked), dim=1)


def pack(config: DecoderConfig, packed: PackedInput, device: torch.device) -> Packing:
    """Positions and mask of a packed input."""
    turns = decoder.rope(config, torch.from_numpy(packed.positions).to(device))
    lengths = torch.tensor(packed.lengths, device=device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    places = torch.arange(len(owner), device=device)
    own = (owner[:, None] == owner) & (places[:, None] >= places)
    seen = torch.ones((len(owner), packed.image), dtype=torch.bool, device=device)
    last = packed.image + torch.cumsum(lengths, 0) - 1
    return Packing(turns, packed.image, packed.local, last, torch.cat((seen, own), dim=1))


def run_layer(config: DecoderConfig, weights: LayerWeights, x: Tensor, packing: Packing) -> Tensor:
    """Output [I + S, D] of one full layer for x [I + S, D]."""
    return decoder.decoder_layer(config, weights, x, packing.turns, packing.attend)


def layer_scores(
    config: DecoderConfig, weights: LayerWeights, x: Tensor, packing: Packing
) -> Tensor:
    """Text-to-image attention of one layer, as `lrs_edge.search.rfm.token_scores` makes scores.

    Args:
        config: Sizes of the stack.
        weights: Of the layer; input norm, query and key projections are enough.
        x: [I + S, D], the layer's input.
        packing: Geometry.

    Returns:
        float32 [Q, n]: of each question's last token, softmax per head over the n local vision
        tokens, mean over heads.
    """
    logits = decoder.attention_logits(
        config, weights, x, packing.turns, packing.last, slice(*packing.local)
    )
    return torch.softmax(logits.transpose(0, 1).float(), dim=-1).mean(dim=1)
