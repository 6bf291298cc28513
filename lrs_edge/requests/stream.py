"""An answer in the making, for its readers: piece by piece, in any thread or event loop."""

from __future__ import annotations

import weakref
from contextlib import suppress
from types import TracebackType

from lrs_edge.answer.answer import Answer, Progress
from lrs_edge.errors import CancelledError, UsageError
from lrs_edge.requests.progress import OnProgress
from lrs_edge.requests.ticket import Ticket


class AnswerStream:
    """The text of an answer, piece by piece; iterate once, then read `answer`.

    The question is under way, or waits for its turn, whether or not anybody reads; what is not read
    yet is kept. Use it with `for` or `async for`, from one thread or several, and `close` it from
    anywhere to give up on the rest; a stream that nobody holds any more is given up too.

    Args:
        ticket: The request.
        on_progress: Told about every step, by whoever reads, while reading.
    """

    def __init__(
        self, ticket: Ticket[str | Progress, Answer], on_progress: OnProgress | None
    ) -> None:
        self._ticket = ticket
        self._on_progress = on_progress
        self._answer: Answer | None = None
        self._closed = False
        # The queue holds on to the ticket, but not to the stream.
        weakref.finalize(self, ticket.abandon).atexit = False

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        """The next piece of text; waits for it.

        Raises:
            CancelledError: The scene or the engine was closed.
            LrsEdgeError: As `Scene.ask`; whatever `on_progress` raises ends the question.
        """
        try:
            while (piece := self._piece()) is None:
                if self._is_over():
                    raise StopIteration
                self._ticket.wait()
        except StopIteration:
            raise
        except BaseException:
            # An interrupt (Ctrl-C) or an error of `on_progress`: nobody will read the rest.
            self._ticket.cancel("reading the answer was interrupted")
            raise
        return piece

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        """As `__next__`, for `async for`; a wait that is cancelled leaves the stream usable."""
        while (piece := self._piece()) is None:
            if self._is_over():
                raise StopAsyncIteration
            await self._something()
        return piece

    async def _something(self) -> None:
        """Wait, without a thread, until there may be another event."""
        # Imported here: asyncio takes a tenth of the time that loading the embedded model takes.
        import asyncio

        loop = asyncio.get_running_loop()
        happened = loop.create_future()

        def settle() -> None:
            if not happened.done():
                happened.set_result(None)

        def wake() -> None:
            # A loop that was closed meanwhile waits for nothing.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

        if self._ticket.wake(wake):
            await asyncio.wait([happened], timeout=self._ticket.seconds_waiting())

    def _piece(self) -> str | None:
        """The next piece of text that is there already; progress before it is told."""
        while True:
            try:
                event = self._ticket.poll()
            except CancelledError:
                if self._closed:
                    return None
                raise
            if not isinstance(event, Progress):
                return event
            if self._on_progress is not None:
                self._on_progress(event)

    def _is_over(self) -> bool:
        if self._closed:
            return True
        if not self._ticket.is_over:
            return False
        self._answer = self._ticket.result()
        return True

    def close(self) -> None:
        """Give up on the rest of the answer, from any thread; does not wait for anything.

        Readers are told that the stream is over. The engine is free for the next question as soon
        as it has ended the step that it is in: a tile, a part of the prompt, a token.
        """
        if self._answer is None:
            self._closed = True
            self._ticket.cancel("the stream was closed")

    async def aclose(self) -> None:
        """As `close`, which never waits, under the name that `contextlib.aclosing` wants."""
        self.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            UsageError: The stream is not exhausted yet, or was closed.
        """
        if self._answer is None:
            raise UsageError("the answer is not finished; iterate over the stream first")
        return self._answer
