"""ONNX graph of the vision stage: tower, then projector on all tokens. Batch size is dynamic."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from lrs_edge_export.checkpoints.qwen_tower import QwenTower
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.checkpoints.towers import ClipTower, TransformerTower
from lrs_edge_export.checkpoints.vision import (
    EfficientNetTower,
    ObjectHead,
    VisionNeck,
    VisionStage,
    same_padding,
)
from lrs_edge_export.graphs.fused_tower import FusedQwenTransformer, FusedTransformer
from lrs_edge_export.graphs.onnx_writer import GraphWriter
from lrs_edge_export.graphs.qwen_tower_graph import QwenTransformer
from lrs_edge_export.graphs.transformer_graph import Transformer, projected
from lrs_edge_export.graphs.weight_file import WeightFile


def write_vision(
    stage: VisionStage, path: Path, weights: WeightFile, *, fused: bool = False
) -> None:
    """Write the vision graph.

    Args:
        stage: Tower and projector.
        path: The graph file.
        weights: Its external data, which both flavours share.
        fused: In flavour `fused`, of onnxruntime's own operators (`fused_tower`); for
            transformers (`fuses`) whose weights are floats when they are multiplied.
    """
    graph = GraphWriter("vision", weights)
    pixels = graph.from_float32(graph.input("pixel_values", ("N", 3, stage.tile, stage.tile)))
    if isinstance(stage.tower, QwenTower):
        qwen = (FusedQwenTransformer if fused else QwenTransformer)(graph, stage.tower)
        _project(graph, stage, qwen.features(pixels))
    elif isinstance(stage.tower, TransformerTower):
        transformer = (FusedTransformer if fused else Transformer)(graph, stage.tower)
        _project(graph, stage, transformer.features(pixels))
    elif fused:
        raise ValueError("a tower of convolutions has no fused flavour")
    else:
        net = _EfficientNet(graph, stage.tower)
        _project(graph, stage, *net.features(pixels))
        if (head := stage.objects) is not None:
            objects = graph.to_float32(net.objects(head))
            graph.node("Identity", objects, out="objects", label="objects.output")
    graph.output("tokens", ("N", stage.grid**2, stage.hidden))
    if stage.objects is not None:
        cells = stage.objects.scale * stage.tower.grid
        graph.output("objects", ("N", stage.objects.outputs, cells, cells))
    graph.save(path)


def fuses(stage: VisionStage) -> bool:
    """Whether there is a `fused` flavour of the vision graph: of transformers, not convolutions."""
    return isinstance(stage.tower, (QwenTower, TransformerTower))


def write_tower(
    stage: VisionStage, tower: ClipTower, path: Path, projector: Path, weights: WeightFile
) -> None:
    """Write a CLIP tower that gives its attention out, and the projector (`bundle.manifest`).

    Args:
        stage: Tower and projector.
        tower: The stage's tower.
        path: The tower's graph file.
        projector: The projector's graph file.
        weights: External data, shared with the whole stage's graph; queries and keys of the layer
            after the last that is run are added.
    """
    places = tower.grid**2
    graph = GraphWriter("vision_tower", weights)
    clip = Transformer(graph, tower)
    pixels = graph.input("pixel_values", ("N", 3, stage.tile, stage.tile))
    features = clip.features(graph.from_float32(pixels))
    attention, keys = clip.last_attention()
    next_attention, next_keys = clip.next_attention()
    for name, value, shape in (
        ("features", features, ("N", places, tower.hidden)),
        ("cls_attention", attention, ("N", places)),
        ("keys", keys, ("N", places, tower.hidden // tower.heads)),
        ("next_cls_attention", next_attention, ("N", places)),
        ("next_keys", next_keys, ("N", places, tower.hidden)),
    ):
        graph.node("Identity", graph.to_float32(value), out=name)
        graph.output(name, shape)
    graph.save(path)
    graph = GraphWriter("projector", weights)
    _project(graph, stage, graph.from_float32(graph.input("features", ("N", "M", tower.hidden))))
    graph.output("tokens", ("N", "M", stage.hidden))
    graph.save(projector)


def _project(
    graph: GraphWriter, stage: VisionStage, features: str, context: str | None = None
) -> None:
    """The projector, of what a neck gives too; its result is called `tokens`."""
    parts = [features]
    if stage.deepstack:
        widths = graph.constant([stage.width] * (1 + len(stage.deepstack)))
        outs = ("",) * (1 + len(stage.deepstack))
        parts = graph.nodes("Split", features, widths, outs=outs, axis=-1)
    made = [
        projected(graph, part, projector, stage.tower.grid, stage.width)
        for part, projector in zip(parts, (stage.projector, *stage.deepstack), strict=True)
    ]
    tokens = graph.node("Concat", *made, axis=-1) if stage.deepstack else made[0]
    if context is not None and stage.neck is not None:
        linear = stage.neck.projection
        added = graph.linear(context, "projector.neck", lambda: linear.read("weight"))
        tokens = graph.node("Add", tokens, added)
    graph.node("Identity", graph.to_float32(tokens), out="tokens")


class _EfficientNet:
    """efficientnet-lite0's features; batch norms are folded into the convolutions before them."""

    def __init__(self, graph: GraphWriter, tower: EfficientNetTower) -> None:
        self._graph = graph
        self._tower = tower
        self._neck_maps: tuple[str, str] | None = None

    def features(self, pixels: str) -> tuple[str, str | None]:
        """Features [N, grid * grid, 1280], and what the neck gives, [N, grid * grid, outputs]."""
        graph, tower = self._graph, self._tower
        x = low = self._relu6(self._conv(pixels, "_conv_stem", "_bn0", kernel=3, stride=2))
        for i, block in enumerate(tower.blocks):
            name, y = f"_blocks.{i}", x
            if block.expand != 1:
                y = self._relu6(self._conv(y, f"{name}._expand_conv", f"{name}._bn0"))
            y = self._conv(
                y,
                f"{name}._depthwise_conv",
                f"{name}._bn1",
                kernel=block.kernel,
                stride=block.stride,
                groups=block.middle,
            )
            y = self._conv(self._relu6(y), f"{name}._project_conv", f"{name}._bn2")
            residual = block.stride == 1 and block.inputs == block.outputs
            x = graph.node("Add", y, x) if residual else y
            low = x if i == tower.low_block else low
        x = self._relu6(self._conv(x, "_conv_head", "_bn1"))
        context = None if tower.neck is None else self._context(tower.neck, x, low)
        return self._rows(x, tower.features), context

    def _rows(self, x: str, channels: int) -> str:
        """Places [N, grid * grid, channels] of a map [N, channels, grid, grid]."""
        flat = self._graph.node(
            "Reshape", x, self._graph.constant([0, channels, self._tower.grid**2])
        )
        return self._graph.node("Transpose", flat, perm=[0, 2, 1])

    def _context(self, neck: VisionNeck, high: str, low: str) -> str:
        """What the neck makes of the features and the finer map, [N, grid * grid, outputs]."""
        graph, conv = self._graph, partial(self._plain_conv, "neck", neck.tensors)
        coarse = self._relu6(conv(high, "high", 1))
        fine = self._relu6(conv(low, "low", 2, stride=2))
        near = self._relu6(conv(graph.node("Concat", coarse, fine, axis=1), "context.0", 3))
        far = self._relu6(conv(near, "context.1", 3, dilation=2))
        both = graph.node("Concat", near, far, axis=1)
        self._neck_maps = both, low
        words = conv(both, "words", 1)
        scaled = graph.node("Mul", graph.node("Sigmoid", words), graph.real(neck.gain))
        return self._rows(graph.node("Concat", far, scaled, axis=1), neck.outputs)

    def objects(self, head: ObjectHead) -> str:
        """Maps [N, C + 2, 2 * grid, 2 * grid] of a head on the neck; after `features`.

        Probabilities of the C labels, then the logarithms of sizes. Nodes behind the last
        convolution have names by which static quantization leaves them alone.
        """
        assert self._neck_maps is not None
        graph, (both, low) = self._graph, self._neck_maps
        conv = partial(self._plain_conv, "objects", head.tensors)
        # Channels of one cell's four parts lie side by side, as in torch's pixel_shuffle.
        coarse = graph.node(
            "DepthToSpace",
            self._relu6(conv(both, "coarse", 1)),
            blocksize=head.scale,
            mode="CRD",
        )
        fine = self._relu6(conv(low, "fine", 1))
        x = graph.node("Concat", coarse, fine, axis=1)
        for name in ("mix.0", "mix.1"):
            x = self._relu6(conv(x, name, 3))
        parts = graph.constant([len(head.labels), head.sizes])
        logits, sizes = graph.nodes(
            "Split", conv(x, "out", 1), parts, outs=("", ""), label="objects.split", axis=1
        )
        found = graph.node("Sigmoid", logits, label="objects.found")
        return graph.node("Concat", found, sizes, label="objects.maps", axis=1)

    def _plain_conv(
        self,
        part: str,
        tensors: Scoped,
        x: str,
        name: str,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> str:
        """A convolution of the neck or of the head on it: with a bias, and no batch norm after."""
        graph, label = self._graph, f"{part}.{name}"
        pad = dilation * (kernel - 1) // 2 if stride == 1 else 0
        return graph.node(
            "Conv",
            x,
            graph.kernel(label, lambda: tensors.read(f"{name}.weight")),
            graph.weight(f"{label}.bias", lambda: tensors.read(f"{name}.bias")),
            label=label,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            dilations=[dilation] * 2,
        )

    def _conv(
        self, x: str, name: str, norm: str, *, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> str:
        graph = self._graph
        weight = graph.kernel(name, lambda: self._folded(name, norm)[0])
        bias = graph.weight(f"{name}.bias", lambda: self._folded(name, norm)[1])
        before, after = same_padding(kernel, stride)
        return graph.node(
            "Conv",
            *(x, weight, bias),
            label=name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=groups,
        )

    def _folded(self, name: str, norm: str) -> tuple[Array, Array]:
        """Kernel and bias of a convolution together with the batch norm after it."""
        read = self._tower.tensors.read
        gain, shift, mean, variance = (
            read(f"{norm}.{part}").astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / np.sqrt(variance + self._tower.eps)
        kernel = read(f"{name}.weight") * gain[:, None, None, None]
        return kernel.astype(np.float32), (shift - mean * gain).astype(np.float32)

    def _relu6(self, x: str) -> str:
        low, high = self._graph.real(0.0), self._graph.real(6.0)
        return self._graph.node("Clip", x, low, high)
