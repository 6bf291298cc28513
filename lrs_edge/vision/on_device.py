"""What happens to pixels before a vision graph and to tokens after it, on its own device.

Pixels go up as float16 where the graph computes in it: its first step rounds them to that anyway,
so half the bytes carry all that it sees. Bytes (uint8) would be half as many again, but tiles are
resampled in floats and their padding is the mean colour, which bytes cannot say.

Tokens never come down. One small graph after the tower's pools them tile by tile, so that each
tile's tokens have memory of their own and are freed alone, and adds learned positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import VisionSpec
from lrs_edge.engines.base import Feed, Graph, Tensor
from lrs_edge.engines.small_model import TYPES, Node, Value, small_model
from lrs_edge.vision.pooling import between
from lrs_edge.vision.positions import ImagePositions, Mixed


class DeviceTiles:
    """Small graphs around a vision graph.

    Args:
        graph: The vision graph.
        spec: Token grid and pooling.
        positions: Added to tokens, where the model has them.
        half: The graph computes in float16.
    """

    def __init__(
        self, graph: Graph, spec: VisionSpec, positions: ImagePositions | None, *, half: bool
    ) -> None:
        self.half = half
        self._widen = graph.beside(_widening_model()) if half else None
        self._pool = {
            "global": graph.beside(_tokens_model(spec, 1, positions)),
            "local": graph.beside(_tokens_model(spec, spec.local_pool, positions)),
        }
        self._tables: dict[str, Feed] = {}
        if positions is not None:
            self._tables = {
                "row_table": graph.upload(positions.rows),
                "col_table": graph.upload(positions.cols),
            }

    @property
    def device(self) -> str:
        """Where the small graphs run."""
        return self._pool["local"].device

    def pixels(self, tiles: Sequence[NDArray[np.generic]]) -> Feed:
        """Tiles [3, S, S] as the vision graph takes them, float32 [N, 3, S, S]."""
        stacked = np.stack(tiles)
        if self._widen is None or stacked.dtype != np.float16:
            return stacked.astype(np.float32, copy=False)
        (found,) = self._widen.run_on_device({"x": stacked}, ["y"])
        return found

    def tokens(
        self, role: str, tokens: Tensor, number: int, places: tuple[Mixed, Mixed] | None
    ) -> Tensor:
        """Tokens [P * P, D] of one tile, row-major, in memory of their own.

        Args:
            role: `global`, not pooled, or `local`.
            tokens: float32 [N, T, D].
            number: Which of the N tiles.
            places: Of its rows and columns, where there are positions (`ImagePositions.mixed`).
        """
        feeds: dict[str, Feed] = {
            "tokens": tokens,
            "number": np.array([number], np.int64),
            **self._tables,
        }
        for name, mixed in zip(("row", "col"), places or (), strict=False):
            feeds[f"{name}_below"], feeds[f"{name}_above"] = mixed.below, mixed.above
            feeds[f"{name}_share"] = mixed.share
        (found,) = self._pool[role].run_on_device(feeds, ["y"])
        return found


class _TokensModel:
    """Builds the graph that `DeviceTiles.tokens` runs.

    Of sums and products alone: a product of matrices would be rounded to fewer bits by some
    engines.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[np.generic]] = {"one": np.ones(1, np.float32)}

    def reshaped(self, x: str, y: str, *shape: int) -> None:
        """Add `y`, which is x in another shape."""
        self.constants[f"{y}_shape"] = np.array(shape, np.int64)
        self.nodes.append(Node("Reshape", (x, f"{y}_shape"), y))

    def mixed(self, x: str, y: str, axis: int, places: tuple[str, str, str]) -> None:
        """Add `y`, between two neighbours of x along an axis: below, above, share of the latter."""
        below, above, share = places
        self.nodes += [
            Node("Gather", (x, below), f"{y}_below", {"axis": axis}),
            Node("Gather", (x, above), f"{y}_above", {"axis": axis}),
            Node("Sub", ("one", share), f"{y}_rest"),
            Node("Mul", (f"{y}_below", f"{y}_rest"), f"{y}_first"),
            Node("Mul", (f"{y}_above", share), f"{y}_second"),
            Node("Add", (f"{y}_first", f"{y}_second"), y),
        ]

    def pooled(self, side: int, pool: int, pooling: str) -> None:
        """Add `short` [P, P, D] of `tile` [1, side * side, D]."""
        short = -(-side // pool)
        if pool == 1:
            self.reshaped("tile", "short", side, side, -1)
        elif pooling == "bilinear" and side % pool:
            below, above, share = between(side, short)
            self.constants |= {"below": below, "above": above}
            self.constants["across"] = share.astype(np.float32)[:, None]
            self.constants["along"] = share.astype(np.float32)[:, None, None]
            self.reshaped("tile", "square", side, side, -1)
            self.mixed("square", "down", 0, ("below", "above", "along"))
            self.mixed("down", "short", 1, ("below", "above", "across"))
        else:
            self.reshaped("tile", "blocks", short, pool, short, pool, -1)
            means: dict[str, int | Sequence[int]] = {"axes": (1, 3), "keepdims": 0}
            self.nodes.append(Node("ReduceMean", ("blocks",), "short", means))


def _tokens_model(spec: VisionSpec, pool: int, positions: ImagePositions | None) -> bytes:
    model, short = _TokensModel(), -(-spec.grid // pool)
    inputs = {
        "tokens": Value("float32", ("tiles", spec.grid**2, "width")),
        "number": Value("int64", (1,)),
    }
    model.nodes.append(Node("Gather", ("tokens", "number"), "tile", {"axis": 0}))
    model.pooled(spec.grid, pool, spec.pooling)
    last = "short"
    if positions is not None:
        for name, table in (("row", positions.rows), ("col", positions.cols)):
            inputs |= {
                f"{name}_table": Value("float32", (len(table), "width")),
                f"{name}_below": Value("int64", (short,)),
                f"{name}_above": Value("int64", (short,)),
                f"{name}_share": Value("float32", (short, 1)),
            }
            places = f"{name}_below", f"{name}_above", f"{name}_share"
            model.mixed(f"{name}_table", f"{name}s_mixed", 0, places)
        model.reshaped("rows_mixed", "rows", short, 1, -1)
        model.nodes += [
            Node("Add", ("rows", "cols_mixed"), "places"),
            Node("Add", ("short", "places"), "placed"),
        ]
        last = "placed"
    model.reshaped(last, "y", short**2, -1)
    outputs = {"y": Value("float32", (short**2, "width"))}
    return small_model(model.nodes, inputs, outputs, model.constants)


def _widening_model() -> bytes:
    """`y = x`, x float16 [N, 3, S, S], y float32."""
    axes = ("tiles", "colours", "rows", "cols")
    return small_model(
        [Node("Cast", ("x",), "y", {"to": TYPES["float32"]})],
        {"x": Value("float16", axes)},
        {"y": Value("float32", axes)},
    )
