"""How long quantizing takes: estimated before it starts, corrected while it runs.

What takes time is `int4-weight`: the model runs over the calibration data layer by layer, and GPTQ
rounds every matrix input by input. Both are counted in operations, and how fast this machine does
them is timed on a small matrix. Nothing that is written depends on it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrs_edge.engines.devices import StageName
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.quantization.error_feedback import gptq
from lrs_edge_export.quantization.statistics import MAX_BLOCK

#: Seconds between two lines on what is left.
EVERY = 30.0

#: Images that calibration data have where nobody names a folder.
IMAGES = 12

#: Share of an image's local tokens that prompts of the language model keep, and text around them.
_KEPT, _TEXT = 0.25, 60

Shape = tuple[int, int]


@dataclass(frozen=True)
class Speed:
    """Of this machine.

    Attributes:
        products: Multiplications of a matrix product in a second.
        rounding: Seconds that GPTQ takes for one weight, its products left out.
    """

    products: float
    rounding: float

    def seconds(self, shape: Shape, tokens: int) -> float:
        """Of one matrix [N, K]: its part of the run over the data, and its rounding."""
        rows, columns = shape
        block = min(columns, MAX_BLOCK)
        products = rows * columns * tokens + columns * block * tokens
        products += rows * columns * block + 2 * columns * block**2
        return products / self.products + rows * columns * self.rounding


def measured_speed() -> Speed:
    """This machine's, in about a second."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 1024), dtype=np.float32)
    inputs = rng.standard_normal((1024, 1024), dtype=np.float32)
    weight @ inputs
    start = time.perf_counter()
    moments = inputs.T @ inputs
    products = inputs.size * inputs.shape[1] / max(time.perf_counter() - start, 1e-6)
    start = time.perf_counter()
    gptq(weight, 4, 32, [moments])
    whole = time.perf_counter() - start
    known = Speed(products, 0.0).seconds((256, 1024), 0)
    return Speed(products, max(whole - known, 0.1 * whole) / weight.size)


class Effort:
    """The work of one export, and what is left of it.

    Args:
        work: Matrices [N, K] of each stage to be quantized with GPTQ, and the tokens that run
            through it.
        speed: Of the machine.
        tell: Called with a line now and then.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        work: Mapping[StageName, tuple[Sequence[Shape], int]],
        speed: Speed,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._speed = speed
        self._tokens = {stage: tokens for stage, (_, tokens) in work.items()}
        self._left = self._total = sum(
            speed.seconds(shape, tokens) for shapes, tokens in work.values() for shape in shapes
        )
        self._tell = tell
        self._clock = clock
        self._started: float | None = None
        self._told = 0.0
        self._computed = 0.0

    @property
    def estimate(self) -> float:
        """Seconds that all of it should take."""
        return self._total

    def announce(self) -> None:
        """Say how long it should take."""
        self._tell(f"int4-weight should take about {spoken(self._total)} on this machine")

    def begin(self) -> None:
        """Called when the first matrix is about to be quantized."""
        if self._started is None:
            self._started = self._told = self._clock()

    def did(self, stage: StageName, shape: Shape, *, computed: bool) -> None:
        """Called after every matrix, or part of one.

        Args:
            stage: It is of.
            shape: [N, K].
            computed: False where it was kept by an earlier export.
        """
        self.begin()
        cost = self._speed.seconds(shape, self._tokens.get(stage, 0))
        self._left = max(self._left - cost, 0.0)
        self._computed += cost if computed else 0.0
        now = self._clock()
        if now - self._told < EVERY or self._left <= 0:
            return
        self._told = now
        share = 1 - self._left / self._total
        self._tell(f"quantized {share:.0%} of the weights, about {spoken(self.left())} left")

    def left(self) -> float:
        """Seconds left, by what was done so far."""
        if self._started is None or not self._computed:
            return self._left
        return self._left * (self._clock() - self._started) / self._computed


def matrices(model: Model, stage: StageName) -> list[Shape]:
    """Shapes [N, K] of a stage's matrices that GPTQ rounds; of convolutions, none."""
    if stage == "vision":
        tower = model.vision.tower
        if not isinstance(tower, TransformerTower):
            return []
        found = [(name, tower.tensors.shape(name)) for name in tower.tensors.names()]
        pattern = r".*layers\.\d+\..*weight"
        return [_pair(shape) for name, shape in found if _is_matrix(name, shape, pattern)]
    decoder = model.region_focus if stage == "rfm" else model.llm
    found = [(name, decoder.tensors.shape(name)) for name in decoder.tensors.names()]
    shapes = [_pair(shape) for name, shape in found if _is_matrix(name, shape, r"layers\..*weight")]
    return shapes if stage == "rfm" else [*shapes, model.lm_head.shape]


def tokens_of(model: Model, stage: StageName, side: int, images: int = IMAGES) -> int:
    """Tokens of all calibration data that run through a stage, more or less.

    Args:
        model: The checkpoint.
        stage: Which.
        side: Local tiles along a side of an image.
        images: How many.
    """
    vision, tiles = model.vision, side * side
    if stage == "vision":
        return images * (1 + tiles) * vision.tower.grid**2
    grid, local = vision.grid, tiles * (-(-vision.grid // vision.local_pool)) ** 2
    return images * round(grid**2 + local * (1 if stage == "rfm" else _KEPT) + _TEXT)


def spoken(seconds: float) -> str:
    """A time as `40 s`, `12 min` or `2 h 10 min`."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes, -1), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _is_matrix(name: str, shape: Sequence[int], pattern: str) -> bool:
    return len(shape) == 2 and re.fullmatch(pattern, name) is not None


def _pair(shape: Sequence[int]) -> Shape:
    rows, columns = shape
    return rows, columns
