"""The vision stage in PyTorch: CLIP or EfficientNet, its neck and heads, and the projector.

Weights are read as they are used; everything is float32 on the CPU; batch norms are not folded.
Shares no code with the graph writers, which it checks.

Observers are told the names that graphs have: `encoder.layers.0.mlp.fc1`, `projector.2`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import (
    ClipTower,
    EfficientNetTower,
    ObjectHead,
    VisionNeck,
    VisionStage,
)
from lrs_edge_export.torch_model.decoder import Observer


def vision_tokens(stage: VisionStage, pixels: Tensor, observe: Observer | None = None) -> Tensor:
    """Tokens [N, T, D] of normalised tiles [N, 3, S, S]."""
    with torch.inference_mode():
        return project(stage, vision_features(stage, pixels, observe), observe)


def vision_objects(stage: VisionStage, pixels: Tensor) -> Tensor | None:
    """Maps [N, C + 2, 2 * G, 2 * G] of the objects on normalised tiles [N, 3, S, S].

    Probabilities of the C labels, then log2 of widths and of heights in cells. None where the stage
    has no head for them.
    """
    if not isinstance(stage.tower, EfficientNetTower) or stage.objects is None:
        return None
    assert stage.neck is not None
    with torch.inference_mode():
        high, low = _efficientnet_maps(stage.tower, pixels)
        near, far = _neck_maps(stage.neck, high, low)
        return _objects(stage.objects, torch.cat((near, far), dim=1), low)


def vision_features(stage: VisionStage, pixels: Tensor, observe: Observer | None = None) -> Tensor:
    """The tower's features [N, T, W] of normalised tiles [N, 3, S, S].

    What a neck gives stands behind them: [N, T, W + outputs].
    """
    if isinstance(stage.tower, EfficientNetTower):
        return _efficientnet(stage.tower, pixels)
    x = clip_embeddings(stage.tower, pixels)
    for layer in range(stage.tower.layers):
        x = clip_layer(stage.tower, layer, x, observe)
    return clip_features(x)


def project(stage: VisionStage, features: Tensor, observe: Observer | None = None) -> Tensor:
    """Tokens [N, T, D] of `vision_features`."""
    features, context = features[..., : stage.width], features[..., stage.width :]
    inner = _linear(stage.projector, "0", features, observe, "projector.")
    tokens = _linear(stage.projector, "2", F.gelu(inner), observe, "projector.")
    if stage.neck is None:
        return tokens
    if observe is not None:
        observe("projector.neck", context)
    return tokens + F.linear(context, _read(stage.neck.projection, "weight"))


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
    x, low = _efficientnet_maps(tower, pixels)
    if tower.neck is not None:
        x = torch.cat((x, _neck(tower.neck, x, low)), dim=1)
    return x.flatten(2).transpose(1, 2)


def _efficientnet_maps(tower: EfficientNetTower, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 1280, G, G], and the map at twice their resolution, [N, 112, 2 * G, 2 * G]."""
    x = low = F.relu6(_conv_norm(tower, "_conv_stem", "_bn0", pixels, stride=2))
    for i, block in enumerate(tower.blocks):
        name, y = f"_blocks.{i}", x
        if block.expand != 1:
            y = F.relu6(_conv_norm(tower, f"{name}._expand_conv", f"{name}._bn0", y))
        depthwise = (f"{name}._depthwise_conv", f"{name}._bn1")
        y = F.relu6(_conv_norm(tower, *depthwise, y, stride=block.stride, groups=block.middle))
        y = _conv_norm(tower, f"{name}._project_conv", f"{name}._bn2", y)
        x = x + y if block.stride == 1 and block.inputs == block.outputs else y
        low = x if i == tower.low_block else low
    return F.relu6(_conv_norm(tower, "_conv_head", "_bn1", x)), low


def _neck(neck: VisionNeck, high: Tensor, low: Tensor) -> Tensor:
    """What a token is given beside its features: [N, outputs, G, G].

    Args:
        neck: The neck.
        high: Features [N, 1280, G, G].
        low: Map at twice their resolution, [N, 112, 2 * G, 2 * G].
    """
    near, far = _neck_maps(neck, high, low)
    words = torch.sigmoid(_conv(neck.tensors, "words", torch.cat((near, far), dim=1)))
    return torch.cat((far, 6 * words), dim=1)


def _neck_maps(neck: VisionNeck, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """What the two 3 x 3 convolutions of a neck give, [N, width, G, G] each."""
    conv = partial(_conv, neck.tensors)
    joined = torch.cat((F.relu6(conv("high", high)), F.relu6(conv("low", low, stride=2))), dim=1)
    near = F.relu6(conv("context.0", joined, padding=1))
    return near, F.relu6(conv("context.1", near, padding=2, dilation=2))


def _objects(head: ObjectHead, both: Tensor, low: Tensor) -> Tensor:
    """Maps of objects, [N, C + 2, 2 * G, 2 * G].

    Args:
        head: The head.
        both: What both 3 x 3 convolutions of the neck give, [N, 2 * width, G, G].
        low: Map at twice their resolution, [N, 112, 2 * G, 2 * G].
    """
    conv = partial(_conv, head.tensors)
    coarse = F.pixel_shuffle(F.relu6(conv("coarse", both)), head.scale)
    x = torch.cat((coarse, F.relu6(conv("fine", low))), dim=1)
    for name in ("mix.0", "mix.1"):
        x = F.relu6(conv(name, x, padding=1))
    out, count = conv("out", x), len(head.labels)
    return torch.cat((torch.sigmoid(out[:, :count]), out[:, count:]), dim=1)


def _conv(tensors: Scoped, name: str, x: Tensor, **how: int) -> Tensor:
    """A convolution of the neck or of the head on it."""
    weight, bias = (_read(tensors, f"{name}.{part}") for part in ("weight", "bias"))
    return F.conv2d(x, weight, bias, **how)


def _conv_norm(
    tower: EfficientNetTower, name: str, norm: str, x: Tensor, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolution with TensorFlow's SAME padding (the odd pixel goes after), then batch norm."""
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
