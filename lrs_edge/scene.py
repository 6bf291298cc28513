"""A scene: one opened image, and what the questions about it share."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lrs_edge.answer import Answer
from lrs_edge.cache_pool import CachePool
from lrs_edge.errors import UsageError, out_of_memory
from lrs_edge.evidence import can_be_placed
from lrs_edge.memory import give_back
from lrs_edge.options import AskOptions, Resampling, merged_options
from lrs_edge.progress import OnProgress
from lrs_edge.prompt import PromptTokens
from lrs_edge.pyramid import build_pyramid
from lrs_edge.queueing import RequestQueue
from lrs_edge.request import Caches, Request
from lrs_edge.stages import Stages
from lrs_edge.tiles import TileSource
from lrs_edge.trace import Trace, check_target
from lrs_edge.vision import FeatureCache

if TYPE_CHECKING:
    from lrs_edge.raster import Raster


class Scene:
    """One opened image. Features and prefixes are computed as questions need them, then kept.

    Made by `Engine.open`. Questions are independent of each other; what they share is the image:
    tokens of tiles that were looked at, and the keys and values of the prompt's beginning with the
    global view.
    """

    def __init__(
        self, raster: Raster, stages: Stages, queue: RequestQueue, pool: CachePool
    ) -> None:
        self.raster = raster
        self._stages: Stages | None = stages
        self._queue = queue
        self._features = FeatureCache(pool)
        self._pool = pool
        self._tiles = TileSource(raster, stages.vision, self._features)
        self._caches: Caches | None = None

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the image and free what was cached; may be called more than once."""
        # An unfinished stream of this very thread cannot be waited for; it ends with an error.
        with nullcontext() if self._queue.is_mine else self._queue.turn():
            if self._caches is not None:
                self._caches.close()
            self._stages = self._caches = None
            self._features.clear()
            self.raster.close()
        give_back()

    def ask(
        self,
        question: str,
        options: AskOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        trace: str | Path | None = None,
        **overrides: Any,
    ) -> Answer:
        """Answer one question.

        Args:
            question: What to ask.
            options: How; defaults where None.
            on_progress: Told about every step, from this thread.
            trace: `.npz` file to write a trace to.
            overrides: Single options by name, such as `max_tiles=64`.

        Raises:
            QuestionError: The question is empty or too long.
            UsageError: An option cannot be meant.
            ImageError: A part of the image cannot be read.
            BackendError: An engine fails or runs out of memory.
        """
        stream = self.stream(question, options, on_progress=on_progress, trace=trace, **overrides)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        question: str,
        options: AskOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        trace: str | Path | None = None,
        **overrides: Any,
    ) -> AnswerStream:
        """As `ask`, but the text comes piece by piece; the search starts with the first piece.

        The scene's engine is busy until the stream is exhausted or closed.
        """
        chosen = merged_options(options, overrides)
        prompt = self._open_stages().prompt.tokens(question, chosen.end_str)
        target = None if trace is None else check_target(trace)
        return AnswerStream(self._run(question, prompt, chosen, on_progress, target))

    def can_be_placed(self) -> bool:
        """Whether a tile that a search may look at has a polygon in WGS 84.

        Cheap, and known before a question is asked: without such a tile, GeoJSON has no features.
        """
        manifest, raster = self._open_stages().manifest, self.raster
        pyramid = build_pyramid(
            raster.height,
            raster.width,
            tile=manifest.vision.tile,
            base_side=manifest.search.base_side,
        )
        return can_be_placed(pyramid, raster.place)

    def _run(
        self,
        question: str,
        prompt: PromptTokens,
        options: AskOptions,
        on_progress: OnProgress | None,
        trace_path: Path | None,
    ) -> Generator[str, None, Answer]:
        with self._queue.turn():
            stages = self._open_stages()
            trace = None if trace_path is None else Trace()
            caches = self._caches_for(stages, options.resampling)
            caches.take()
            request = Request(
                stages,
                self.raster,
                self._tiles,
                caches,
                question,
                prompt,
                options,
                on_progress,
                trace,
            )
            try:
                yield from request.pieces()
            except MemoryError as error:
                raise out_of_memory("the question cannot be answered", error) from error
            finally:
                caches.release()
            if trace is not None and trace_path is not None:
                trace.write(trace_path)
            return request.answer()

    def _open_stages(self) -> Stages:
        if self._stages is None:
            raise UsageError("the scene is closed; open the image again")
        return self._stages

    def _caches_for(self, stages: Stages, resampling: Resampling) -> Caches:
        """KV caches kept between questions for their common prefix.

        The prefix shows the global view, so it is another one under another resampling.
        """
        if self._caches is None or self._caches.resampling != resampling:
            if self._caches is not None:
                self._caches.close()
            self._caches = Caches(
                stages.focus.new_cache(), stages.llm.new_cache(), resampling, self._pool
            )
        return self._caches


class AnswerStream:
    """The text of an answer, piece by piece; iterate once, in one thread, then read `answer`."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._answer: Answer | None = None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            # The generator's value comes once; a closed or used up one has none.
            self._answer = self._answer or end.value
            raise

    def close(self) -> None:
        """Give up on the rest of the answer and free the engine for the next request."""
        self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            UsageError: The stream is not exhausted yet.
        """
        if self._answer is None:
            raise UsageError("the answer is not finished; iterate over the stream first")
        return self._answer
