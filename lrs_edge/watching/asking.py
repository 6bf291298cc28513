"""Asking the engine: what the loop needs to know of it, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lrs_edge.errors import ProductTimeoutError
from lrs_edge.watching.names import shown

if TYPE_CHECKING:
    from lrs_edge.answer.report import ImageFacts
    from lrs_edge.engine import Engine
    from lrs_edge.requests.options import AskOptions
    from lrs_edge.scene import Scene


@dataclass(frozen=True)
class Reply:
    """One answer, ready to be written.

    Attributes:
        record: Members of the JSON, as `ask --format json` has them.
        collection: Members of the GeoJSON; None where the image has no place on the earth.
        summary: The few members that standard output is told.
    """

    record: dict[str, Any]
    collection: dict[str, Any] | None
    summary: dict[str, Any] = field(default_factory=dict)


class Asking(Protocol):
    """One opened image."""

    def ask(self, question: str, seconds: float) -> Reply:
        """The answer to one question; `ProductTimeoutError` where it takes longer."""


class Asker(Protocol):
    """Opens images."""

    def open(self, image: Path, seconds: float) -> AbstractContextManager[Asking]:
        """An image, opened in so many seconds at most."""


@dataclass(frozen=True)
class EngineAsker:
    """Asks a loaded model.

    Attributes:
        engine: The model.
        options: Of every question.
        image_options: Further arguments of `Engine.open`.
    """

    engine: Engine
    options: AskOptions
    image_options: Mapping[str, Any]

    @contextmanager
    def open(self, image: Path, seconds: float) -> Iterator[Asking]:
        """An image, opened.

        Raises:
            ImageError: It cannot be read in that time, or is refused.
        """
        from lrs_edge.answer.report import ImageFacts

        with self.engine.open(image, timeout=_limit(seconds), **self.image_options) as scene:
            info = scene.raster.info
            facts = ImageFacts(shown(str(image)), info.width, info.height, info.crs, info.gsd)
            is_placed = not info.unlocated and scene.can_be_placed()
            yield _SceneAsking(scene, facts, is_placed, self.options)


@dataclass(frozen=True)
class _SceneAsking:
    scene: Scene
    facts: ImageFacts
    is_placed: bool
    options: AskOptions

    def ask(self, question: str, seconds: float) -> Reply:
        """The answer to one question.

        Raises:
            ProductTimeoutError: It took longer than that; an answer that the user's own `--timeout`
                cut short is one.
            LrsEdgeError: As `Scene.ask`.
        """
        import msgspec

        from lrs_edge.answer import report

        own = self.options.timeout
        is_own = own is not None and own <= seconds
        limit = own if is_own else _limit(seconds)
        answer = self.scene.ask(question, replace(self.options, timeout=limit))
        if answer.finish_reason == "timeout" and not is_own:
            raise ProductTimeoutError("the time limit was over before the answer was whole")
        names = ("answer", "finish_reason", "confidence", "warnings")
        record = msgspec.to_builtins(report.record(answer, self.facts))
        return Reply(
            record,
            report.feature_collection(answer, self.facts) if self.is_placed else None,
            {name: record[name] for name in names if name in record},
        )


def _limit(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
