"""The three stages in plain PyTorch, written for reading: what exported graphs must agree with.

Shares no code with the graph writers. Weights are read layer by layer, so that a model larger than
memory can be checked. Everything is float32 on the CPU; batch norms are not folded.

An observer is called with the name and the input [.., K] of every linear before it is applied.
Names are those of the graphs: `layers.0.mlp.down_proj`, `lm_head`, `encoder.layers.0.mlp.fc1`,
`projector.2`. It must not change what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.model import (
    ClipTower,
    DecoderConfig,
    DecoderStage,
    EfficientNetTower,
    VisionStage,
)
from lrs_edge_export.checkpoints.tensors import Array, Scoped

Observer = Callable[[str, Tensor], None]


def vision_tokens(stage: VisionStage, pixels: Tensor, observe: Observer | None = None) -> Tensor:
    """Tokens [N, T, D] of normalised tiles [N, 3, S, S]."""
    with torch.inference_mode():
        return project(stage, vision_features(stage, pixels, observe), observe)


def vision_features(stage: VisionStage, pixels: Tensor, observe: Observer | None = None) -> Tensor:
    """The tower's features [N, T, W] of normalised tiles [N, 3, S, S]."""
    if isinstance(stage.tower, EfficientNetTower):
        return _efficientnet(stage.tower, pixels)
    x = clip_embeddings(stage.tower, pixels)
    for layer in range(stage.tower.layers):
        x = clip_layer(stage.tower, layer, x, observe)
    return clip_features(x)


def project(stage: VisionStage, features: Tensor, observe: Observer | None = None) -> Tensor:
    """Tokens [N, T, D] of features [N, T, W]."""
    inner = _linear(stage.projector, "0", features, observe, "projector.")
    return _linear(stage.projector, "2", F.gelu(inner), observe, "projector.")


def rfm_logits(
    stage: DecoderStage,
    embeds: Tensor,
    positions: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Scaled query-key products [H, T] of the last token at the scoring layer.

    Args:
        stage: The RFM.
        embeds: [T, D].
        positions: [T] for RoPE; None for 0 .. T-1.
        observe: Observer of linears.
    """
    with torch.inference_mode():
        cos, sin = rope(stage.config, len(embeds), positions)
        x = decoder_states(stage, embeds, positions, observe)
        return scoring_logits(stage, x, cos, sin, observe)


def scoring_logits(
    stage: DecoderStage, x: Tensor, cos: Tensor, sin: Tensor, observe: Observer | None = None
) -> Tensor:
    """Scaled query-key products [H, T] of the last place at the scoring layer.

    Args:
        stage: The RFM.
        x: [T, D], output of the last full layer.
        cos: [T, head_dim], of `rope`.
        sin: [T, head_dim].
        observe: Observer of linears.
    """
    config, layer = stage.config, stage.config.layers
    x = _rms_norm(x, _read(stage.tensors, f"layers.{layer}.input_layernorm.weight"), config.eps)
    query = _rotate(_heads(stage, layer, "q", x[-1:], observe), cos[-1:], sin[-1:])
    key = _rotate(_heads(stage, layer, "k", x, observe), cos, sin)
    key = key.repeat_interleave(config.heads // config.kv_heads, 0)
    return (query @ key.transpose(1, 2))[:, 0] / math.sqrt(config.head_dim)


def llm_logits(
    stage: DecoderStage,
    lm_head: Array,
    embeds: Tensor,
    last: int,
    positions: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Logits [last, V] after each of the last places.

    Args:
        stage: The language model.
        lm_head: float32 [V, D].
        embeds: [T, D].
        last: Number of places.
        positions: [T] for RoPE; None for 0 .. T-1.
        observe: Observer of linears.
    """
    with torch.inference_mode():
        x = final_norm(stage, decoder_states(stage, embeds, positions, observe)[-last:])
        if observe is not None:
            observe("lm_head", x)
        return F.linear(x, torch.from_numpy(lm_head))


def final_norm(stage: DecoderStage, x: Tensor) -> Tensor:
    """What `lm_head` is given, [T, D], of the last layer's output [T, D]."""
    return _rms_norm(x, _read(stage.tensors, "norm.weight"), stage.config.eps)


def decoder_states(
    stage: DecoderStage,
    x: Tensor,
    positions: Tensor | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """Output [T, D] of the last full layer for x [T, D], under a causal mask."""
    cos, sin = rope(stage.config, len(x), positions)
    for layer in range(stage.config.layers):
        x = decoder_layer(stage, layer, x, cos, sin, observe)
    return x


def decoder_layer(
    stage: DecoderStage,
    layer: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    observe: Observer | None = None,
) -> Tensor:
    """Output [T, D] of one full layer for x [T, D], under a causal mask.

    Args:
        stage: The stack.
        layer: Which layer.
        x: [T, D].
        cos: [T, head_dim], of `rope`.
        sin: [T, head_dim].
        observe: Observer of linears.
    """
    name, eps = f"layers.{layer}", stage.config.eps
    norm = _read(stage.tensors, f"{name}.input_layernorm.weight")
    x = x + _attention(stage, layer, _rms_norm(x, norm, eps), cos, sin, observe)
    norm = _read(stage.tensors, f"{name}.post_attention_layernorm.weight")
    normed = _rms_norm(x, norm, eps)
    gate = F.silu(_linear(stage.tensors, f"{name}.mlp.gate_proj", normed, observe))
    wide = gate * _linear(stage.tensors, f"{name}.mlp.up_proj", normed, observe)
    return x + _linear(stage.tensors, f"{name}.mlp.down_proj", wide, observe)


def _attention(
    stage: DecoderStage,
    layer: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    observe: Observer | None,
) -> Tensor:
    group = stage.config.heads // stage.config.kv_heads
    query = _rotate(_heads(stage, layer, "q", x, observe), cos, sin)
    key = _rotate(_heads(stage, layer, "k", x, observe), cos, sin).repeat_interleave(group, 0)
    value = _heads(stage, layer, "v", x, observe).repeat_interleave(group, 0)
    mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    flat = mixed.transpose(0, 1).reshape(len(x), -1)
    return _linear(stage.tensors, f"layers.{layer}.self_attn.o_proj", flat, observe)


def _heads(
    stage: DecoderStage, layer: int, part: str, x: Tensor, observe: Observer | None = None
) -> Tensor:
    """Query, key or value [heads, T, head_dim]."""
    projected = _linear(stage.tensors, f"layers.{layer}.self_attn.{part}_proj", x, observe)
    return projected.view(len(x), -1, stage.config.head_dim).transpose(0, 1)


def rope(config: DecoderConfig, length: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim] of the positions, 0 .. T-1 for None."""
    places = torch.arange(length) if positions is None else positions
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    # The reciprocal of the power, as transformers computes it: at large positions bits matter.
    angles = torch.outer(places.to(torch.float32), 1.0 / config.theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def clip_embeddings(tower: ClipTower, pixels: Tensor) -> Tensor:
    """Input [N, 1 + T, W] of the first encoder layer for normalised tiles [N, 3, S, S]."""
    read, count = tower.tensors, len(pixels)
    kernel = _read(read, "embeddings.patch_embedding.weight")
    patches = F.conv2d(pixels, kernel, stride=tower.patch).flatten(2).transpose(1, 2)
    first = _read(read, "embeddings.class_embedding").expand(count, 1, -1)
    x = torch.cat((first, patches), dim=1) + _read(read, "embeddings.position_embedding.weight")
    return _layer_norm(tower, "pre_layrnorm", x)


def clip_layer(tower: ClipTower, layer: int, x: Tensor, observe: Observer | None = None) -> Tensor:
    """Output [N, 1 + T, W] of one encoder layer for x of the same shape."""
    read, name = tower.tensors, f"encoder.layers.{layer}"
    normed = _layer_norm(tower, f"{name}.layer_norm1", x)
    query, key, value = (
        _linear(read, f"{name}.self_attn.{part}_proj", normed, observe)
        .view(len(x), -1, tower.heads, tower.hidden // tower.heads)
        .transpose(1, 2)
        for part in ("q", "k", "v")
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + _linear(read, f"{name}.self_attn.out_proj", mixed, observe)
    wide = _linear(read, f"{name}.mlp.fc1", _layer_norm(tower, f"{name}.layer_norm2", x), observe)
    return x + _linear(read, f"{name}.mlp.fc2", _activation(tower.activation, wide), observe)


def clip_features(x: Tensor) -> Tensor:
    """Features [N, T, W] in the last layer's output: all but the class token's."""
    return x[:, 1:]


def _activation(name: str, x: Tensor) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _layer_norm(tower: ClipTower, name: str, x: Tensor) -> Tensor:
    weight, bias = (_read(tower.tensors, f"{name}.{part}") for part in ("weight", "bias"))
    return F.layer_norm(x, (tower.hidden,), weight, bias, tower.eps)


def _efficientnet(tower: EfficientNetTower, pixels: Tensor) -> Tensor:
    x = F.relu6(_conv_norm(tower, "_conv_stem", "_bn0", pixels, stride=2))
    for i, block in enumerate(tower.blocks):
        name, y = f"_blocks.{i}", x
        if block.expand != 1:
            y = F.relu6(_conv_norm(tower, f"{name}._expand_conv", f"{name}._bn0", y))
        depthwise = (f"{name}._depthwise_conv", f"{name}._bn1")
        y = F.relu6(_conv_norm(tower, *depthwise, y, stride=block.stride, groups=block.middle))
        y = _conv_norm(tower, f"{name}._project_conv", f"{name}._bn2", y)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
    x = F.relu6(_conv_norm(tower, "_conv_head", "_bn1", x))
    return x.flatten(2).transpose(1, 2)


def _conv_norm(
    tower: EfficientNetTower, name: str, norm: str, x: Tensor, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolution with TensorFlow's SAME padding (the odd pixel goes behind), then batch norm."""
    kernel = _read(tower.tensors, f"{name}.weight")
    size, side = kernel.shape[-1], x.shape[-1]
    pad = max((-(-side // stride) - 1) * stride + size - side, 0)
    before, after = pad // 2, pad - pad // 2
    y = F.conv2d(F.pad(x, (before, after, before, after)), kernel, stride=stride, groups=groups)
    weight, bias, mean, variance = (
        _read(tower.tensors, f"{norm}.{part}")
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return F.batch_norm(y, mean, variance, weight, bias, eps=tower.eps)


def _linear(
    tensors: Scoped, name: str, x: Tensor, observe: Observer | None = None, prefix: str = ""
) -> Tensor:
    if observe is not None:
        observe(prefix + name, x)
    bias = _read(tensors, f"{name}.bias") if tensors.has(f"{name}.bias") else None
    return F.linear(x, _read(tensors, f"{name}.weight"), bias)


def _read(tensors: Scoped, name: str) -> Tensor:
    return torch.from_numpy(tensors.read(name))
