"""The vision stage in PyTorch: its tower, an EfficientNet's neck and heads, and the projector.

Weights are read as they are used; everything is float32 on the CPU; batch norms are not folded.
Shares no code with the graph writers, which it checks.

Observers are told the names that graphs have: `encoder.layers.0.mlp.fc1`, `projector.2`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.vision import (
    EfficientNetTower,
    ObjectHead,
    VisionNeck,
    VisionStage,
)
from lrs_edge_export.torch_model.decoder import Observer
from lrs_edge_export.torch_model.layers import activation, linear, read
from lrs_edge_export.torch_model.tower import tower_embeddings, tower_features, tower_layer


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
    x = tower_embeddings(stage.tower, pixels)
    for layer in range(stage.tower.layers):
        x = tower_layer(stage.tower, layer, x, observe)
    return tower_features(stage.tower, x)


def project(stage: VisionStage, features: Tensor, observe: Observer | None = None) -> Tensor:
    """Tokens [N, T, D] of `vision_features`."""
    x, context = features[..., : stage.width], features[..., stage.width :]
    tokens = _projected(stage, stage.projector, x, observe)
    if stage.deepstack:
        parts = zip(stage.deepstack, torch.split(context, stage.width, dim=-1), strict=True)
        more = [_projected(stage, projector, part, observe) for projector, part in parts]
        return torch.cat((tokens, *more), dim=-1)
    if stage.neck is None:
        return tokens
    if observe is not None:
        observe("projector.neck", context)
    return tokens + F.linear(context, read(stage.neck.projection, "weight"))


def _projected(
    stage: VisionStage, projector: Projector, x: Tensor, observe: Observer | None
) -> Tensor:
    """Tokens [N, T, D] that one projector makes of features [N, places, width]."""
    tensors = projector.tensors
    if projector.shuffle > 1:
        grid, factor = stage.tower.grid, projector.shuffle
        planes = x.transpose(1, 2).reshape(len(x), stage.width, grid, grid)
        squares = F.pixel_unshuffle(planes, factor)
        squares = squares.reshape(len(x), stage.width, factor**2, *squares.shape[2:])
        # Channels of one feature stay together; torch puts the places of a square there.
        x = squares.transpose(1, 2).flatten(1, 2).flatten(2).transpose(1, 2)
    if projector.norm:
        weight, bias = (read(tensors, f"{projector.norm}.{part}") for part in ("weight", "bias"))
        x = F.layer_norm(x, x.shape[-1:], weight, bias, projector.eps)
    for number, name in enumerate(projector.linears):
        x = activation(projector.activation, x) if number else x
        if observe is not None:
            observe(projector.label(number), x)
        x = linear(tensors, name, x)
    return x


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
    weight, bias = (read(tensors, f"{name}.{part}") for part in ("weight", "bias"))
    return F.conv2d(x, weight, bias, **how)


def _conv_norm(
    tower: EfficientNetTower, name: str, norm: str, x: Tensor, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolution with TensorFlow's SAME padding (the odd pixel goes after), then batch norm."""
    kernel = read(tower.tensors, f"{name}.weight")
    size, side = kernel.shape[-1], x.shape[-1]
    pad = max((-(-side // stride) - 1) * stride + size - side, 0)
    before, after = pad // 2, pad - pad // 2
    y = F.conv2d(F.pad(x, (before, after, before, after)), kernel, stride=stride, groups=groups)
    weight, bias, mean, variance = (
        read(tower.tensors, f"{norm}.{part}")
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return F.batch_norm(y, mean, variance, weight, bias, eps=tower.eps)
