"""The same in PyTorch: its fused attention, CUDA graphs where they help, and the floors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from benchmarks import measure
from benchmarks.gpu.model import Case


def milliseconds(run: Callable[[], object], device: str, repeat: int) -> float:
    """Median of several runs after three that are not counted, each waited for."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def waited() -> None:
        run()
        wait()

    return measure.milliseconds(waited, repeat, uncounted=3)


def captured(run: Callable[[], object], device: str) -> Callable[[], object] | None:
    """A CUDA graph of a run; None where there is no CUDA."""
    if device != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def floors(device: str) -> dict[str, float]:
    """What the device reaches: bytes read a second, and operations a second of a product."""
    kind = torch.float16 if device == "cuda" else torch.float32
    wide, side = (1 << 15, 8192) if device == "cuda" else (1 << 11, 512)
    matrix = torch.randn(wide, wide, device=device, dtype=kind)
    vector = torch.randn(wide, device=device, dtype=kind)
    read = milliseconds(partial(torch.mv, matrix, vector), device, 10)
    size = matrix.numel() * matrix.element_size()
    del matrix
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    product = milliseconds(lambda: left @ right, device, 10)
    return {"read_GBps": size / read / 1e6, "product_TFLOPs": 2 * side**3 / product / 1e9}


class Tower:
    """CLIP's layers and the projector, with random weights.

    Args:
        case: Sizes.
        device: `cpu` or `cuda`.
        kind: Type of weights and activations.
    """

    def __init__(self, case: Case, device: str, kind: torch.dtype) -> None:
        tower, hidden = case.tower, case.sizes.hidden
        self._tower = tower
        made: dict[str, Any] = {"device": device, "dtype": kind}
        width, wide = tower.hidden, tower.intermediate

        def linear(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
            weight = torch.randn(outputs, inputs, **made) / inputs**0.5
            return weight, torch.zeros(outputs, **made)

        self._kernel = torch.randn(width, 3, tower.patch, tower.patch, **made) / 25
        self._places = torch.randn(tower.grid**2 + 1, width, **made)
        shapes = (width, 3 * width), (width, width), (width, wide), (wide, width)
        # The last layer is not run: features are those of the one before it.
        self._layers = [[linear(*shape) for shape in shapes] for _ in range(tower.layers - 1)]
        self._norm = torch.ones(width, **made), torch.zeros(width, **made)
        self._projector = linear(width, hidden), linear(hidden, hidden)
        self._made = made

    def pixels(self, tiles: int) -> Tensor:
        """Random tiles [N, 3, S, S]."""
        return torch.randn(tiles, 3, self._tower.side, self._tower.side, **self._made)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Tokens [N, T, D]."""
        tower, count = self._tower, len(pixels)
        x = F.conv2d(pixels, self._kernel, stride=tower.patch).flatten(2).transpose(1, 2)
        x = F.pad(x, (0, 0, 1, 0)) + self._places
        x = self._normed(x)
        for qkv, out, first, second in self._layers:
            packed = F.linear(self._normed(x), *qkv).view(count, x.shape[1], 3, tower.heads, -1)
            query, key, value = packed.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, *out)
            wide = F.linear(self._normed(x), *first)
            x = x + F.linear(wide * torch.sigmoid(1.702 * wide), *second)
        first, second = self._projector
        return F.linear(F.gelu(F.linear(x[:, 1:], *first)), *second)

    def _normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self._tower.hidden,), *self._norm)


class Stack:
    """Decoder layers over buffers of fixed length, with random weights, and a head.

    Args:
        case: Sizes.
        layers: Layers.
        device: `cpu` or `cuda`.
        kind: Type of weights and activations.
    """

    def __init__(self, case: Case, layers: int, device: str, kind: torch.dtype) -> None:
        sizes = self._sizes = case.sizes
        self._made: dict[str, Any] = {"device": device, "dtype": kind}
        self._dim = dim = sizes.hidden // sizes.heads
        rows = (sizes.heads + 2 * sizes.kv_heads) * dim
        wide, hidden = sizes.intermediate, sizes.hidden
        shapes = (rows, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide)
        self._layers = [[self._drawn(*shape) for shape in shapes] for _ in range(layers)]
        self._head = self._drawn(sizes.rows, hidden)
        self._ones = torch.ones(hidden, **self._made)
        buffers = 1, sizes.kv_heads, case.capacity, dim
        self._keys = [torch.zeros(buffers, **self._made) for _ in range(layers)]
        self._values = [torch.zeros(buffers, **self._made) for _ in range(layers)]
        self._frequencies = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)

    def _drawn(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, **self._made) / columns**0.5

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        weights = [weight for layer in self._layers for weight in layer]
        return sum(w.numel() * w.element_size() for w in (*weights, self._head))

    def run(self, new: int, past: int) -> Callable[[], Tensor]:
        """A run over new tokens after some; everything that it reads is made beforehand."""
        x = torch.randn(1, new, self._sizes.hidden, **self._made)
        places = torch.arange(past, past + new, device=self._made["device"])
        return lambda: self._forward(x, places, past + new)

    def _forward(self, x: Tensor, places: Tensor, total: int) -> Tensor:
        sizes, dim, new = self._sizes, self._dim, x.shape[1]
        heads, kv_heads = sizes.heads, sizes.kv_heads
        angles = places[:, None].float() * self._frequencies
        turns = [torch.cat([turn, turn], -1).to(x.dtype) for turn in (angles.cos(), angles.sin())]
        for (qkv, out, wide, narrow), keys, values in zip(
            self._layers, self._keys, self._values, strict=True
        ):
            packed = F.linear(self._normed(x), qkv).view(1, new, -1, dim).transpose(1, 2)
            query, key, value = packed.split([heads, kv_heads, kv_heads], 1)
            query, key = (_turned(part, turns) for part in (query, key))
            keys.index_copy_(2, places, key)
            values.index_copy_(2, places, value)
            mixed = F.scaled_dot_product_attention(
                query, keys[:, :, :total], values[:, :, :total], is_causal=new > 1, enable_gqa=True
            )
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), out)
            gate, up = F.linear(self._normed(x), wide).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, narrow)
        return F.linear(self._normed(x[:, -1:]), self._head)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self._sizes.hidden,), self._ones)


def _turned(x: Tensor, turns: list[Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * turns[0] + torch.cat([-second, first], -1) * turns[1]


def tower_flops(case: Case) -> int:
    """Operations for one tile, projector included."""
    tower, hidden = case.tower, case.sizes.hidden
    places, layers = tower.grid**2 + 1, tower.layers - 1
    weights = layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    attention = 4 * layers * places**2 * tower.hidden
    return 2 * places * weights + attention + 2 * tower.grid**2 * hidden * (tower.hidden + hidden)


def stack_flops(case: Case, layers: int, new: int) -> int:
    """Operations of new tokens after none, the head of one token included."""
    sizes = case.sizes
    dim = sizes.hidden // sizes.heads
    rows = 2 * sizes.hidden + 2 * sizes.kv_heads * dim
    weights = layers * sizes.hidden * (rows + 3 * sizes.intermediate)
    return 2 * new * weights + 2 * layers * new**2 * sizes.hidden + 2 * sizes.rows * sizes.hidden
