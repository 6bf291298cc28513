"""Ask questions about very large satellite and aerial images, where the image is.

import lrs_edge

with lrs_edge.load() as engine:
    scene = engine.open("image.tif")
    answer = scene.ask("How many ships are there?")
    print(answer.text, answer.regions[0].bounds)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrs_edge.answer.answer import (
        Answer,
        KeptTokens,
        LevelReport,
        ObjectReport,
        Progress,
        Region,
        Timings,
        TokenCounts,
    )
    from lrs_edge.engine import Engine, load
    from lrs_edge.errors import (
        BackendError,
        BundleError,
        CancelledError,
        ExportError,
        ImageError,
        LrsEdgeError,
        OutOfMemoryError,
        QuestionError,
        QueueFullError,
        UsageError,
    )
    from lrs_edge.requests.options import AskOptions
    from lrs_edge.requests.stream import AnswerStream
    from lrs_edge.scene import Scene

__version__ = "0.1.0"

_HOMES = {
    "Answer": "answer.answer",
    "AnswerStream": "requests.stream",
    "AskOptions": "requests.options",
    "BackendError": "errors",
    "BundleError": "errors",
    "CancelledError": "errors",
    "Engine": "engine",
    "ExportError": "errors",
    "ImageError": "errors",
    "KeptTokens": "answer.answer",
    "LevelReport": "answer.answer",
    "LrsEdgeError": "errors",
    "ObjectReport": "answer.answer",
    "OutOfMemoryError": "errors",
    "Progress": "answer.answer",
    "QuestionError": "errors",
    "QueueFullError": "errors",
    "Region": "answer.answer",
    "Scene": "scene",
    "Timings": "answer.answer",
    "TokenCounts": "answer.answer",
    "UsageError": "errors",
    "load": "engine",
}

__all__ = [
    "Answer",
    "AnswerStream",
    "AskOptions",
    "BackendError",
    "BundleError",
    "CancelledError",
    "Engine",
    "ExportError",
    "ImageError",
    "KeptTokens",
    "LevelReport",
    "LrsEdgeError",
    "ObjectReport",
    "OutOfMemoryError",
    "Progress",
    "QuestionError",
    "QueueFullError",
    "Region",
    "Scene",
    "Timings",
    "TokenCounts",
    "UsageError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lrs_edge` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lrs_edge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
