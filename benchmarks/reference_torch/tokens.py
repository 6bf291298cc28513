"""Tokens of a level: unpadding, newlines, selection. Grids are row-major, newlines end rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.reference_torch.image import Resized


@dataclass(frozen=True)
class Local:
    """Local tokens of one level.

    Attributes:
        embeds: float32 [rows * width, D], newlines included, zeros where no tile was encoded.
        valid: bool [rows * width], False for those zeros.
        rows: Token rows without padding.
        width: Tokens in a row, with its newline.
    """

    embeds: Tensor
    valid: Tensor
    rows: int
    width: int

    @property
    def newlines(self) -> Tensor:
        """Places int64 [rows] of the newlines."""
        return torch.arange(self.rows) * self.width + self.width - 1


def local_tokens(
    level: Resized,
    tiles: list[tuple[int, int]],
    features: Tensor,
    newline: Tensor,
    size_hw: tuple[int, int],
) -> Local:
    """Place the tokens of some tiles on the whole level, cut its padding off, add newlines.

    Args:
        level: The level.
        tiles: Row and column of each encoded tile.
        features: float32 [len(tiles), P, P, D], their tokens.
        newline: float32 [D].
        size_hw: Height and width whose aspect ratio cuts the padding off.

    Raises:
        ValueError: No token row is left; the authors' code fails there.
    """
    side, hidden = features.shape[1], features.shape[-1]
    canvas = torch.zeros(level.rows, level.cols, side, side, hidden)
    filled = torch.zeros(level.rows, level.cols, side, side, dtype=torch.bool)
    for (row, col), tokens in zip(tiles, features, strict=True):
        canvas[row, col], filled[row, col] = tokens, True
    rows, cols = level.rows * side, level.cols * side
    grid = canvas.transpose(1, 2).reshape(rows, cols, hidden)
    valid = filled.transpose(1, 2).reshape(rows, cols)
    height, width = size_hw
    if width / height > cols / rows:
        grid, valid = (x[: int(height * (cols / width))] for x in (grid, valid))
    else:
        grid, valid = (x[:, : int(width * (rows / height))] for x in (grid, valid))
    if not len(grid):
        raise ValueError("the reference fails on this image: no token row is left")
    column = newline.expand(len(grid), 1, hidden)
    grid = torch.cat((grid, column), dim=1)
    valid = torch.cat((valid, torch.ones(len(valid), 1, dtype=torch.bool)), dim=1)
    return Local(grid.flatten(0, 1), valid.flatten(), *grid.shape[:2])


def with_positions(
    features: Tensor, tables: tuple[Tensor, Tensor], level: Resized, tiles: list[tuple[int, int]]
) -> Tensor:
    """Add each token's place in the image, as the embedded model was trained.

    Args:
        features: float32 [N, P, P, D].
        tables: Embeddings float32 [G, D] of image rows and of image columns.
        level: The tiles' level.
        tiles: Row and column of each.
    """
    side, tile = features.shape[1], level.tiles.shape[-1]
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) * tile / side
    placed = []
    for (row, col), tokens in zip(tiles, features, strict=True):
        down = _between(tables[0], (row * tile + centres) / level.height)
        right = _between(tables[1], (col * tile + centres) / level.width)
        placed.append(tokens + down[:, None] + right[None])
    return torch.stack(placed)


def _between(table: Tensor, shares: Tensor) -> Tensor:
    """Rows [n, D] of a table [G, D] at shares [n] of its length, linear between entries."""
    last = len(table) - 1
    places = shares.clamp(0, 1) * last
    below = places.long().clamp(max=max(last - 1, 0))
    weight = (places - below).to(torch.float32)[:, None]
    return table[below] * (1 - weight) + table[(below + 1).clamp(max=last)] * weight


def head_means(logits: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Scores [n] of attention logits [H, n]: softmax per head, then the mean.

    Quirk: the mask of `hidden` tokens bool [n] passes through a boolean on its way and adds 1.0
    where it should take infinity away.
    """
    if hidden is not None:
        logits = logits + hidden.to(torch.float32)
    means: Tensor = torch.softmax(logits, -1, dtype=torch.float32).mean(0)
    return means


def kept(scores: Tensor, local: Local, ratio: float) -> Tensor:
    """Places int64 [k] of the best valid tokens and of all newlines, ascending."""
    places = torch.nonzero(local.valid)[:, 0]
    best = places[scores[places].topk(int(ratio * len(places))).indices]
    united: Tensor = torch.unique(torch.cat((best, local.newlines)))
    return united


def chosen_tiles(indices: Tensor, local: Local, finer: Resized) -> list[tuple[int, int]]:
    """Tiles of the next level under kept tokens, row-major.

    Quirk: newlines count as the last column of the image.
    """
    rows = (indices // local.width) * finer.rows // local.rows
    cols = (indices % local.width) * finer.cols // local.width
    return sorted(set(zip(rows.tolist(), cols.tolist(), strict=True)))
