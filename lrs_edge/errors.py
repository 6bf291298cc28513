"""Every error that lrs-edge raises on purpose, and the exit code each one means.

    LrsEdgeError                    1  anything that went wrong here
    ├── UsageError                  2  an argument that is not valid
    │   └── QuestionError           2  a question that is empty or too long
    ├── ImageError                  3  an image that cannot be read, or is refused
    │   └── ReadStoppedError        3  a read that was given up when the time was over
    ├── BundleError                 4  a bundle that is incomplete, altered or of unknown version
    ├── QueueFullError              1  too many questions wait for the engine already
    ├── CancelledError              1  a question that was given up, or whose scene was closed
    ├── BackendError                5  an engine that cannot be loaded or fails while running
    │   └── OutOfMemoryError        5  a stage that does not fit into memory
    ├── ExportError                 1  a checkpoint that cannot be exported, or fails parity
    ├── JournalError                1  the journal of `watch`, or a result, cannot be kept on disk
    ├── ProductTimeoutError         6  a product that `watch` gave up at its time limit
    └── QuarantineError             7  products that `watch --once` could not answer

A message says what was wrong, with which file or value, and what to do about it, on one line.
Callers catch `LrsEdgeError`; the command line turns `exit_code` into the process's exit status.
Exit code 6 (timed out with a partial answer) has no error: `finish_reason` of the answer says so.
"""

from __future__ import annotations


class LrsEdgeError(Exception):
    """Base class of all errors raised by lrs-edge."""

    exit_code = 1


class UsageError(LrsEdgeError):
    """An argument or option whose value is not valid."""

    exit_code = 2


class QuestionError(UsageError):
    """A question that is empty, too long or not text."""


class ImageError(LrsEdgeError):
    """An image that cannot be opened, decoded or addressed as asked, or that exceeds a limit."""

    exit_code = 3


class ReadStoppedError(ImageError):
    """A read of an image that was given up because the time was over or it was not wanted."""


class BundleError(LrsEdgeError):
    """A model bundle that is incomplete, altered, hostile or of an unknown schema version."""

    exit_code = 4


class QueueFullError(LrsEdgeError):
    """More questions wait for an engine than may wait; ask again later."""


class CancelledError(LrsEdgeError):
    """A question that was cancelled, or whose scene or engine was closed, before its answer."""


class BackendError(LrsEdgeError):
    """An inference engine that cannot be loaded, has the wrong inputs, or fails while running."""

    exit_code = 5


class OutOfMemoryError(BackendError):
    """A stage whose tensors do not fit into the memory of the device."""


def out_of_memory(what: str, error: BaseException) -> OutOfMemoryError:
    """The error to raise where memory has run out.

    Args:
        what: What could not be done, as a clause.
        error: How it was noticed.
    """
    reason = " ".join(str(error).split())[:200]
    return OutOfMemoryError(
        f"{what}: out of memory; use a smaller --max-tiles or --max-vision-tokens, or a machine "
        f"or device with more memory" + (f" ({reason})" if reason else "")
    )


class ExportError(LrsEdgeError):
    """A checkpoint that cannot be exported, or an export whose parity check failed."""


class JournalError(LrsEdgeError):
    """A journal of `watch` that cannot be read or written or is in use, or a full disk."""


class ProductTimeoutError(LrsEdgeError):
    """A product whose questions took longer than `watch --time-limit`."""

    exit_code = 6


class QuarantineError(LrsEdgeError):
    """Products that could not be answered and were put into quarantine, while all else worked."""

    exit_code = 7
