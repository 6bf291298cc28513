"""The results file: one JSON line per answer after a header, appended as answers come.

A line holds what was answered and what was done for it, not whether it was right: scoring reads
the file (`scoring.py`), so that a rule can change without a model running again. A line that was
cut off when a run was killed is dropped when the run goes on. Files of several chunks may be joined
by `cat`: a header in the middle must say the same as the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import msgspec

from lrs_edge.answer.answer import Timings, TokenCounts
from lrs_edge.errors import LrsEdgeError, UsageError
from lrs_edge.evaluation.question_formats import QuestionFormat
from lrs_edge.files import hold_lock
from lrs_edge.pyramid.box import Box

SCHEMA_NAME: Final = "lrs-edge/eval-results"
SCHEMA_VERSION: Final = 1

#: A longer line is not a result.
MAX_LINE_BYTES = 16 << 20
#: A larger file is refused; an answer takes about 2 kB.
MAX_FILE_BYTES = 4 << 30

#: Numbers in a results file beyond these would not fit the arithmetic, and mean nothing.
_MOST = 1 << 62
_LONGEST_SIDE = 1 << 31

#: Sums of two logits of single precision are smaller.
_LARGEST = 1e39

Finite = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
Side = Annotated[int, msgspec.Meta(ge=1, le=_LONGEST_SIDE)]


class QuestionSource(msgspec.Struct, frozen=True):
    """The question file: name, SHA-256 of its bytes, format, number of questions."""

    file: str
    sha256: str
    format: QuestionFormat
    count: Count


class RunHeader(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a results file: everything that decides the answers.

    Attributes:
        schema: `SCHEMA_NAME`.
        schema_version: Of the file's layout.
        lrs_edge: Version of the program.
        model: Name of the bundle.
        manifest_sha256: Of the bundle's manifest, which holds the hashes of its other files.
        tile: Tile side of the model in pixels.
        provider: Where the engines ran.
        questions: The question file.
        options: Of every question (`AskOptions` by name).
        bands: Bands shown as red, green and blue; None for the usual.
        value_range: Values shown as black and white; None for a stretch.
        view: Other choices of how images are shown that were made; None for none.
        num_chunks: Parts that the questions were split into.
        chunk: Which of them this file answers, from 0.
    """

    schema: Literal["lrs-edge/eval-results"]
    schema_version: Literal[1]
    lrs_edge: str
    model: str
    manifest_sha256: str
    tile: Side
    provider: str
    questions: QuestionSource
    options: dict[str, Any]
    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None
    view: dict[str, Any] | None = None
    num_chunks: int = 1
    chunk: int = 0

    def differences(self, other: RunHeader, *, chunks: bool = True) -> list[str]:
        """What differs between two headers, as `name: this, not that`.

        Args:
            other: The other header.
            chunks: False where two chunks of one run are the same.
        """
        found = []
        mine, others = _flat(self), _flat(other)
        for name in sorted(mine.keys() | others.keys()):
            if mine.get(name) == others.get(name) or (name == "chunk" and not chunks):
                continue
            found.append(f"{name}: {mine.get(name)!r}, not {others.get(name)!r}")
        return found


def _flat(header: RunHeader) -> dict[str, Any]:
    flat: dict[str, Any] = msgspec.to_builtins(header)
    questions, options = flat.pop("questions"), flat.pop("options")
    return {**flat, "question file": questions["sha256"][:12], **options}


class FinestLevel(msgspec.Struct, frozen=True):
    """The finest level searched: size in pixels, tiles, and (row, col) of those looked at."""

    height: Side
    width: Side
    tile_rows: Side
    tile_cols: Side
    tiles: tuple[tuple[Count, Count], ...]


class FlopCounts(msgspec.Struct, frozen=True):
    """Floating-point operations of one question by stage."""

    vision: Count
    rfm: Count
    llm: Count

    @property
    def total(self) -> int:
        """Of all stages."""
        return self.vision + self.rfm + self.llm


class Work(msgspec.Struct, frozen=True):
    """What was done for one answer.

    Attributes:
        image_size: Width and height of the image in pixels.
        search_end: Why the search ended.
        finish_reason: Why the answer ended.
        tiles_encoded: Tiles encoded for this question, the global view not counted.
        tiles_from_cache: Tiles looked at whose tokens earlier questions had left.
        tokens: Token counts.
        seconds: Seconds per step.
        flops: Operations really computed; None where the bundle does not say what they are.
        finest: None where only the global view was looked at.
    """

    image_size: tuple[Side, Side]
    search_end: str
    finish_reason: str
    tiles_encoded: Count
    tiles_from_cache: Count
    tokens: TokenCounts
    seconds: Timings
    flops: FlopCounts | None = None
    finest: FinestLevel | None = None

    def __post_init__(self) -> None:
        """Refuse counts and times that no run has; msgspec tells where in the file."""
        for name, values in (("tokens", astuple(self.tokens)), ("seconds", astuple(self.seconds))):
            if not all(0 <= value <= _MOST for value in values):
                raise ValueError(f"{name} out of range")


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer; names as in the authors' answer files where they have the field.

    Attributes:
        index: Place of the question in the question file.
        question_id: As in the question file.
        image: Path inside the folder of images.
        category: Kind of question.
        dataset: Source dataset.
        prompt: The question.
        ground_truth: The right answer.
        text: The model's answer; empty where it failed.
        choices: Of a multiple-choice question.
        hbox: Evidence boxes.
        thing: What is asked for, where the question file says it.
        error: Why there is no answer; empty where there is one.
        work: What was done; None where there is no answer.
        confidence: See `Answer`, as the next three; None where the answer has none.
        margin: How much rather yes than no, in logits.
        log_probability: Mean log-probability of the answer's tokens.
        least_log_probability: The least of them.
    """

    index: Count
    question_id: str
    image: str
    category: str
    dataset: str
    prompt: str
    ground_truth: str
    text: str
    choices: tuple[str, ...] = ()
    hbox: tuple[Box, ...] = ()
    thing: str = ""
    error: str = ""
    work: Work | None = None
    confidence: Share | None = None
    margin: Finite | None = None
    log_probability: Finite | None = None
    least_log_probability: Finite | None = None


@dataclass(frozen=True)
class Results:
    """A results file, or the files of several chunks of one run.

    Attributes:
        header: Of the first file.
        by_index: Results by the index of their question; of several for one question, the last.
    """

    header: RunHeader
    by_index: dict[int, Result]

    def __iter__(self) -> Iterator[Result]:
        return (self.by_index[index] for index in sorted(self.by_index))

    def __len__(self) -> int:
        return len(self.by_index)


def read_results(paths: Iterable[Path]) -> Results:
    """Read one or more results files of the same run.

    Raises:
        UsageError: A file is not a results file, or the files are of different runs.
    """
    merged: Results | None = None
    for path in paths:
        found, _ = _read(path)
        if merged is None:
            merged = found
            continue
        _same_run(path, merged.header, found.header)
        merged.by_index.update(found.by_index)
    if merged is None:
        raise UsageError("name a results file that `lrs-edge eval` wrote")
    return merged


class ResultsWriter:
    """Appends to a results file; made by `open_results`."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, line: Result | RunHeader) -> None:
        """Write one line; it is in the operating system's hands when this returns.

        Raises:
            LrsEdgeError: The file cannot be written.
        """
        try:
            self._stream.write(msgspec.json.encode(line) + b"\n")
            self._stream.flush()
        except OSError as error:
            raise LrsEdgeError(
                f"{self._path} cannot be written ({error.strerror}); free some space, and run again"
            ) from error


def open_results(path: Path, header: RunHeader) -> tuple[Results, ResultsWriter]:
    """Open a results file to go on with it, or begin one.

    A line cut off at the end of the file is removed.

    Args:
        path: The file.
        header: Of this run.

    Returns:
        What the file holds already, and a writer that appends to it.

    Raises:
        UsageError: The file is something else, or of a run with other settings.
        LrsEdgeError: It cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file; results are read again, so name one")
    known, end = Results(header, {}), 0
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise LrsEdgeError(
            f"{path} cannot be written ({error.strerror}); name another file with -o"
        ) from error
    try:
        _lock(path, stream)
        if not _is_begun(path, header):
            known, end = _read(path)
            _check_same(path, known.header, header)
        stream.truncate(end)
    except BaseException:
        stream.close()
        raise
    writer = ResultsWriter(path, stream)
    if not end:
        writer.append(header)
    return known, writer


def _lock(path: Path, stream: BinaryIO) -> None:
    """Keep a second run from cutting off the line that a first one is writing."""
    if not hold_lock(stream):
        raise UsageError(
            f"another run is writing {path}; wait for it, or name another file with -o"
        )


def _check_same(path: Path, found: RunHeader, wanted: RunHeader) -> None:
    differences = found.differences(wanted)
    if differences:
        raise UsageError(
            f"{path} was written with other settings ({'; '.join(differences)}); go on with "
            "those, or name a new file with -o"
        )


def _is_begun(path: Path, header: RunHeader) -> bool:
    """Whether a file holds no more than the beginning of its header: the run was killed there."""
    line = msgspec.json.encode(header)
    try:
        with path.open("rb") as stream:
            return line.startswith(stream.read(len(line) + 1))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a results file"
        ) from error


def _read(path: Path) -> tuple[Results, int]:
    """A results file, and the place after its last whole line."""
    header: RunHeader | None = None
    found: dict[int, Result] = {}
    end = 0
    try:
        with path.open("rb") as stream:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UsageError(
                    f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB; name a file that "
                    "`lrs-edge eval` wrote"
                )
            for number, line in enumerate(_lines(path, stream), 1):
                if not line.endswith(b"\n"):
                    break
                parsed = _parsed(f"{path} line {number}", line, first=header is None)
                if isinstance(parsed, Result):
                    found[parsed.index] = parsed
                elif header is None:
                    header = parsed
                else:
                    _same_run(path, header, parsed)
                end += len(line)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a results file"
        ) from error
    if header is None:
        raise UsageError(f"{path} is not a results file; name one that `lrs-edge eval` wrote")
    return Results(header, found), end


def _lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(
                f"{path} holds a line of more than {MAX_LINE_BYTES} bytes; name a file that "
                "`lrs-edge eval` wrote"
            )
        yield line


def _parsed(where: str, line: bytes, *, first: bool) -> RunHeader | Result:
    try:
        if first or line.startswith(b'{"schema"'):
            return msgspec.json.decode(line, type=RunHeader)
        return msgspec.json.decode(line, type=Result)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(
            f"{where} is not what `lrs-edge eval` writes ({error}); name a results file"
        ) from error


def _same_run(path: Path, first: RunHeader, other: RunHeader) -> None:
    differences = first.differences(other, chunks=False)
    if differences:
        raise UsageError(
            f"{path} is of another run than the results before it ({'; '.join(differences)}); "
            "score the two apart"
        )
