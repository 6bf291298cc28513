"""Parts of manifests for tests that make their own."""

from __future__ import annotations

from typing import Literal

from lrs_edge.bundle.manifest import DecoderSpec, Flavour, GraphFile, VisionSpec


def decoder_spec(
    graph: str,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    vocabulary: int = 0,
) -> DecoderSpec:
    """A stack in fp32 with one graph."""
    return DecoderSpec(
        graphs=(GraphFile(graph, Flavour.GQA),),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        intermediate=0,
        precision="fp32",
        floats="float32",
        vocabulary=vocabulary,
    )


def vision_spec(
    graph: str,
    tile: int,
    grid: int,
    local_pool: int,
    *,
    mean: float = 0.5,
    std: float = 0.5,
    pooling: Literal["mean", "bilinear"] = "mean",
) -> VisionSpec:
    """An encoder in fp32 with one graph; mean and std are those of every channel."""
    return VisionSpec(
        graphs=(GraphFile(graph, Flavour.PLAIN),),
        tile=tile,
        grid=grid,
        local_pool=local_pool,
        pooling=pooling,
        mean=(mean, mean, mean),
        std=(std, std, std),
        precision="fp32",
        flops=0,
    )
