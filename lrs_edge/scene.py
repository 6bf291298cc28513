"""A scene: one opened image, and what the questions about it share."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lrs_edge.answer.answer import Answer, Progress
from lrs_edge.answer.evidence import can_be_placed
from lrs_edge.answer.trace import Trace, check_target
from lrs_edge.errors import UsageError, out_of_memory
from lrs_edge.pyramid.levels import build_pyramid
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.memory import give_back
from lrs_edge.requests.options import AskOptions, Resampling, merged_options
from lrs_edge.requests.progress import OnProgress
from lrs_edge.requests.question_run import QuestionRun
from lrs_edge.requests.queue import RequestQueue
from lrs_edge.requests.scene_caches import SceneCaches
from lrs_edge.requests.stream import AnswerStream
from lrs_edge.requests.ticket import Ticket, Work
from lrs_edge.stages import Stages
from lrs_edge.vision.encoder import FeatureCache
from lrs_edge.vision.tiles import TileSource

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster


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
        self._caches: SceneCaches | None = None
        # Stands for this scene in the queue, which does not keep the scene alive.
        self._mark = object()

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
        """Close the image and free what was cached; may be called more than once, anywhere.

        Questions that wait or are under way end with a `CancelledError`; the step that the engine
        is in (a tile, a part of the prompt, a token) is waited for.
        """
        self._stages = None
        self._queue.cancel(self._mark, "the scene was closed before the answer was there")
        if self._queue.is_forked:
            # A thread that read from the image may have held locks during the fork.
            return
        caches, self._caches = self._caches, None
        if caches is not None:
            caches.close()
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
            on_progress: Told about every step, in this thread; what it raises ends the question.
            trace: `.npz` file to write a trace to.
            overrides: Single options by name, such as `max_tiles=64`.

        Raises:
            QuestionError: The question is empty or too long.
            UsageError: An option is not valid.
            QueueFullError: Too many questions wait already.
            CancelledError: The scene or the engine was closed meanwhile.
            ImageError: A part of the image cannot be read.
            BackendError: An engine fails or runs out of memory.
        """
        stream = self.stream(question, options, on_progress=on_progress, trace=trace, **overrides)
        for _ in stream:
            pass
        return stream.answer

    async def aask(
        self,
        question: str,
        options: AskOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        trace: str | Path | None = None,
        **overrides: Any,
    ) -> Answer:
        """As `ask`, without blocking the event loop; cancelling the task gives the question up."""
        stream = self.stream(question, options, on_progress=on_progress, trace=trace, **overrides)
        try:
            async for _ in stream:
                pass
        finally:
            stream.close()
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
        """As `ask`, but the text comes piece by piece. Returns at once.

        The question is submitted here, its `timeout` counts from here, and it is worked on whether
        or not the stream is read; the stream can be read and closed in any thread or event loop
        (`for` and `async for`). `on_progress` is told by whoever reads.

        Raises:
            QuestionError: The question is empty or too long.
            UsageError: An option is not valid.
            QueueFullError: Too many questions wait already.
        """
        chosen = merged_options(options, overrides)
        stages = self._open_stages()
        prompt = stages.prompt.tokens(question, chosen.end_str)
        target = None if trace is None else check_target(trace)
        collected = None if target is None else Trace()
        asked = QuestionRun(stages, self.raster, self._tiles, question, prompt, chosen, collected)

        def run(ticket: Ticket[str | Progress, Answer]) -> Answer:
            tell = None if on_progress is None else ticket.tell
            caches = self._caches_for(self._open_stages(), chosen.resampling)
            caches.take()
            try:
                for piece in asked.pieces(caches, tell, lambda: ticket.is_given_up):
                    ticket.tell(piece)
            except MemoryError as error:
                raise out_of_memory("the question cannot be answered", error) from error
            finally:
                caches.release()
            if collected is not None and target is not None:
                collected.write(target)
            return asked.answer()

        work = Work(run, asked.too_late, asked.deadline)
        ticket = self._queue.submit(work, self._mark)
        return AnswerStream(ticket, on_progress)

    def astream(
        self,
        question: str,
        options: AskOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        trace: str | Path | None = None,
        **overrides: Any,
    ) -> AnswerStream:
        """As `stream`, under the name that goes with `aask`: for `async for`."""
        return self.stream(question, options, on_progress=on_progress, trace=trace, **overrides)

    def save_report(self, answer: Answer, path: str | Path) -> None:
        """Write an answer of this scene as a picture, a page or a map (docs/reports.md).

        Args:
            answer: What `ask` returned.
            path: File whose ending says the form: `.png`, `.html`, `.geojson`, `.gpkg`. It appears
                whole or not at all.

        Raises:
            UsageError: The ending is unknown, the file cannot be written, the answer is about an
                image of another size, or the image has no place on a map (`.geojson`, `.gpkg`).
        """
        from lrs_edge.answer.report import ImageFacts
        from lrs_edge.reports.save import check_places, check_reports, save_report
        from lrs_edge.reports.views import Views

        self._open_stages()
        target, info = Path(path), self.raster.info
        check_reports([target])
        check_places([target], self.raster, self.can_be_placed)
        facts = ImageFacts(info.path, info.width, info.height, info.crs, info.gsd)
        try:
            save_report(answer, target, facts, Views(self.raster))
        except OSError as error:
            raise UsageError(
                f"the report {target} cannot be written ({error.strerror}); name another"
            ) from error

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
            stretched=manifest.vision.stretched,
        )
        return can_be_placed(pyramid, raster.place)

    def _open_stages(self) -> Stages:
        if self._stages is None:
            raise UsageError("the scene is closed; open the image again")
        return self._stages

    def _caches_for(self, stages: Stages, resampling: Resampling) -> SceneCaches:
        """KV caches kept between questions for their common prefix.

        The prefix shows the global view, so it is another one under another resampling.
        """
        if self._caches is None or self._caches.resampling != resampling:
            if self._caches is not None:
                self._caches.close()
            self._caches = SceneCaches(
                None if stages.focus is None else stages.focus.new_cache(),
                stages.llm.new_cache(),
                resampling,
                self._pool,
            )
        return self._caches
