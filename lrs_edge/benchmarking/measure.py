"""What one stage was seen to do: times of its repetitions, memory, bytes read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lrs_edge.benchmarking.floor import Work
from lrs_edge.benchmarking.machine import FileReads, file_reads
from lrs_edge.requests.memory import peak_memory


@dataclass(frozen=True)
class Spread:
    """Median, standard deviation and extremes of some figures."""

    median: float
    deviation: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: tuple[float, ...]) -> Spread:
        """Of at least one figure; the deviation of a single one is 0."""
        deviation = statistics.stdev(figures) if len(figures) > 1 else 0.0
        return cls(statistics.median(figures), deviation, min(figures), max(figures))


@dataclass(frozen=True)
class Measurement:
    """One stage with one set of parameters.

    Attributes:
        stage: Name of the stage.
        parameters: What was run, in words.
        seconds: Of each repetition.
        unit: What times are given per: `tile`, `token`, ...
        units: How many of these one repetition did.
        rate_unit: What is given per second, empty for nothing.
        rated: How many of these one repetition did.
        work: What one repetition had to do; None where there is no sensible floor.
        floor_seconds: A floor that was measured beside every repetition, in place of `work`.
        peak: Largest resident memory in bytes, at the end of the stage; 0 if unknown.
        growth: How much the stage raised it.
        raster_bytes: Raw pixels that one repetition took out of the image; None for other stages.
        reads: Bytes of files that one repetition read; None where the system does not tell.
    """

    stage: str
    parameters: str
    seconds: tuple[float, ...]
    unit: str
    units: int
    rate_unit: str = ""
    rated: float = 0
    work: Work | None = None
    floor_seconds: tuple[float, ...] = ()
    peak: int = 0
    growth: int = 0
    raster_bytes: int | None = None
    reads: FileReads | None = None

    @property
    def time(self) -> Spread:
        """Seconds per unit."""
        return Spread.of(tuple(seconds / self.units for seconds in self.seconds))

    @property
    def rate(self) -> Spread | None:
        """Figures per second."""
        if not self.rate_unit:
            return None
        return Spread.of(tuple(self.rated / seconds for seconds in self.seconds))


@dataclass
class Stopwatch:
    """Times the part of a repetition that counts; preparations stay outside.

    Attributes:
        seconds: Of every repetition so far.
        reads: Bytes of files read in the last of them; None where the system does not tell.
    """

    seconds: list[float] = field(default_factory=list)
    reads: FileReads | None = None

    def time(self, run: Callable[[], object]) -> None:
        """Run and time."""
        before = file_reads()
        start = time.perf_counter()
        run()
        self.seconds.append(time.perf_counter() - start)
        after = file_reads()
        self.reads = None if before is None or after is None else after - before


@dataclass(frozen=True)
class Timed:
    """Times and memory of the repetitions of a stage; the fields are those of `Measurement`."""

    seconds: tuple[float, ...]
    peak: int
    growth: int
    reads: FileReads | None


def repeat(
    once: Callable[[Stopwatch], object],
    repetitions: int,
    *,
    warmup: bool,
) -> Timed:
    """Run a stage some times.

    Args:
        once: One repetition; times what counts with the stopwatch, once.
        repetitions: How often, at least once.
        warmup: Whether it first runs once untimed.
    """
    start = peak_memory()
    if warmup:
        once(Stopwatch())
    watch = Stopwatch()
    for _ in range(repetitions):
        once(watch)
    # Linux counts pages in batches, so that a later figure can be a little below an earlier one.
    peak = max(peak_memory(), start)
    return Timed(tuple(watch.seconds), peak, peak - start, watch.reads)
