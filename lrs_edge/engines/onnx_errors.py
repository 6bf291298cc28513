"""What onnxruntime's errors mean."""

from __future__ import annotations

from lrs_edge.errors import BackendError, out_of_memory
from lrs_edge.requests.memory import means_no_memory


def first_line(error: Exception) -> str:
    """An error in one line, cut where it is long."""
    return " ".join(str(error).split())[:400]


def translated_error(error: Exception, what: str) -> BackendError:
    """One line for the user out of an engine's error."""
    if isinstance(error, BackendError):
        return error
    if means_no_memory(error):
        return out_of_memory(what, error)
    return BackendError(f"{what}: {first_line(error)}")
