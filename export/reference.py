"""The three stages in plain PyTorch, written for reading: what exported graphs must agree with.

Shares no code with the graph writers. Weights are read layer by layer, so that a model larger than
memory can be checked. Everything is float32 on the CPU; batch norms are not folded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge.export.stages import (
    ClipTower,
    DecoderConfig,
    DecoderStage,
    EfficientNetTower,
    VisionStage,
)
from lrs_edge.export.tensors import Array, Scoped


def vision_tokens(stage: VisionStage, pixels: Tensor) -> Tensor:
    """Tokens [N, T, D] of normalised tiles [N, 3, S, S]."""
    with torch.inference_mode():
        if isinstance(stage.tower, ClipTower):
            features = _clip(stage.tower, pixels)
        else:
            features = _efficientnet(stage.tower, pixels)
        return _linear(stage.projector, "2", F.gelu(_linear(stage.projector, "0", features)))


def rfm_logits(stage: DecoderStage, embeds: Tensor, positions: Tensor | None = None) -> Tensor:
    """Scaled query-key products [H, T] of the last token at the scoring layer.

    Args:
        stage: The RFM.
        embeds: [T, D].
        positions: [T] for RoPE; None for 0 .. T-1.
    """
    with torch.inference_mode():
        config, layer = stage.config, stage.config.layers
        cos, sin = _rope(config, len(embeds), positions)
        x = decoder_states(stage, embeds, positions)
        x = _rms_norm(x, _read(stage.tensors, f"layers.{layer}.input_layernorm.weight"), config.eps)
        query = _rotate(_heads(stage, layer, "q", x[-1:]), cos[-1:], sin[-1:])
        key = _rotate(_heads(stage, layer, "k", x), cos, sin)
        key = key.repeat_interleave(config.heads // config.kv_heads, 0)
        return (query @ key.transpose(1, 2))[:, 0] / math.sqrt(config.head_dim)


def llm_logits(
    stage: DecoderStage,
    lm_head: Array,
    embeds: Tensor,
    last: int,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [last, V] after each of the last places.

    Args:
        stage: The language model.
        lm_head: float32 [V, D].
        embeds: [T, D].
        last: Number of places.
        positions: [T] for RoPE; None for 0 .. T-1.
    """
    with torch.inference_mode():
        x = decoder_states(stage, embeds, positions)[-last:]
        x = _rms_norm(x, _read(stage.tensors, "norm.weight"), stage.config.eps)
        return F.linear(x, torch.from_numpy(lm_head))


def decoder_states(stage: DecoderStage, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """Output [T, D] of the last full layer for x [T, D], under a causal mask."""
    config = stage.config
    cos, sin = _rope(config, len(x), positions)
    for layer in range(config.layers):
        name = f"layers.{layer}"
        norm = _read(stage.tensors, f"{name}.input_layernorm.weight")
        x = x + _attention(stage, layer, _rms_norm(x, norm, config.eps), cos, sin)
        norm = _read(stage.tensors, f"{name}.post_attention_layernorm.weight")
        normed = _rms_norm(x, norm, config.eps)
        gate = F.silu(_linear(stage.tensors, f"{name}.mlp.gate_proj", normed))
        wide = gate * _linear(stage.tensors, f"{name}.mlp.up_proj", normed)
        x = x + _linear(stage.tensors, f"{name}.mlp.down_proj", wide)
    return x


def _attention(stage: DecoderStage, layer: int, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    group = stage.config.heads // stage.config.kv_heads
    query = _rotate(_heads(stage, layer, "q", x), cos, sin)
    key = _rotate(_heads(stage, layer, "k", x), cos, sin).repeat_interleave(group, 0)
    value = _heads(stage, layer, "v", x).repeat_interleave(group, 0)
    mixed = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    flat = mixed.transpose(0, 1).reshape(len(x), -1)
    return _linear(stage.tensors, f"layers.{layer}.self_attn.o_proj", flat)


def _heads(stage: DecoderStage, layer: int, part: str, x: Tensor) -> Tensor:
    """Query, key or value [heads, T, head_dim]."""
    projected = _linear(stage.tensors, f"layers.{layer}.self_attn.{part}_proj", x)
    return projected.view(len(x), -1, stage.config.head_dim).transpose(0, 1)


def _rope(config: DecoderConfig, length: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
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


def _clip(tower: ClipTower, pixels: Tensor) -> Tensor:
    read, count = tower.tensors, len(pixels)
    kernel = _read(read, "embeddings.patch_embedding.weight")
    patches = F.conv2d(pixels, kernel, stride=tower.patch).flatten(2).transpose(1, 2)
    first = _read(read, "embeddings.class_embedding").expand(count, 1, -1)
    x = torch.cat((first, patches), dim=1) + _read(read, "embeddings.position_embedding.weight")
    x = _layer_norm(tower, "pre_layrnorm", x)
    for layer in range(tower.layers):
        name = f"encoder.layers.{layer}"
        normed = _layer_norm(tower, f"{name}.layer_norm1", x)
        query, key, value = (
            _linear(read, f"{name}.self_attn.{part}_proj", normed)
            .view(count, -1, tower.heads, tower.hidden // tower.heads)
            .transpose(1, 2)
            for part in ("q", "k", "v")
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + _linear(read, f"{name}.self_attn.out_proj", mixed)
        wide = _linear(read, f"{name}.mlp.fc1", _layer_norm(tower, f"{name}.layer_norm2", x))
        x = x + _linear(read, f"{name}.mlp.fc2", _activation(tower.activation, wide))
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


def _linear(tensors: Scoped, name: str, x: Tensor) -> Tensor:
    bias = _read(tensors, f"{name}.bias") if tensors.has(f"{name}.bias") else None
    return F.linear(x, _read(tensors, f"{name}.weight"), bias)


def _read(tensors: Scoped, name: str) -> Tensor:
    return torch.from_numpy(tensors.read(name))
