"""A benchmark as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import msgspec

from lrs_edge.benchmarking.floor import floor_of
from lrs_edge.benchmarking.measure import Measurement, Spread
from lrs_edge.benchmarking.run import Benchmark
from lrs_edge.bundle.parity import StageParity

_HEADERS = (
    "stage", "parameters", "time", "rate", "floor", "bound by", "of the floor", "peak MB",
    "growth MB", "pixels MB", "files MB", "disk MB",
)  # fmt: skip
#: Figures in bytes, in the order of the last columns.
_BYTES = ("peak", "growth", "raster", "file", "disk")
#: Columns of numbers.
_RIGHT = frozenset(_HEADERS[2:]) - {"bound by"}

Record = dict[str, Any]


def records(benchmark: Benchmark) -> list[Record]:
    """One flat record per measurement; None where a figure is not known or makes no sense.

    Times are in milliseconds per `per`, memory and reads in bytes, those of reads per repetition.
    """
    return [_record(measurement, benchmark) for measurement in benchmark.measurements]


def _record(measured: Measurement, benchmark: Benchmark) -> Record:
    time, rate = measured.time, measured.rate
    seconds, bound = _floor(measured, benchmark)
    per_unit = None if seconds is None else seconds / measured.units
    work, reads = measured.work, measured.reads
    return {
        "stage": measured.stage,
        "parameters": measured.parameters,
        "per": measured.unit,
        "ms": time.median * 1e3,
        "ms_deviation": time.deviation * 1e3,
        "ms_min": time.least * 1e3,
        "ms_max": time.most * 1e3,
        "rate": None if rate is None else rate.median,
        "rate_deviation": None if rate is None else rate.deviation,
        "rate_unit": measured.rate_unit or None,
        "floor_ms": None if per_unit is None else per_unit * 1e3,
        "floor_bound": bound,
        "floor_share": None if per_unit is None else per_unit / time.median,
        "operations": work.operations if work is not None and work.operations else None,
        "bytes_moved": None if work is None else work.moved,
        "peak_bytes": measured.peak or None,
        "growth_bytes": measured.growth if measured.peak and measured.stage != "load" else None,
        "raster_bytes": measured.raster_bytes,
        "file_bytes": None if reads is None else reads.requested,
        "disk_bytes": None if reads is None else reads.disk,
    }


def _floor(measured: Measurement, benchmark: Benchmark) -> tuple[float | None, str | None]:
    if measured.floor_seconds:
        return Spread.of(measured.floor_seconds).median, "onnxruntime"
    floor = None if measured.work is None else floor_of(measured.work, benchmark.peaks)
    return (None, None) if floor is None else (floor.seconds, floor.bound)


def peak_texts(benchmark: Benchmark) -> dict[str, str]:
    """The machine's peaks in words, by what they are."""
    compute = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in benchmark.peaks.compute.items())
    sizes = ", ".join(
        f"{speed / 1e9:.1f} over {size >> 20} MiB"
        for size, speed in benchmark.peaks.bandwidth.items()
    )
    texts = {"peak GOP/s": compute, "bandwidth GB/s": sizes}
    return {name: text for name, text in texts.items() if text}


def to_json(benchmark: Benchmark) -> str:
    """An object of facts, peaks (operations and bytes per second), rows and accuracy."""
    peaks = {
        "operations_per_second": dict(benchmark.peaks.compute),
        "bytes_per_second": {str(k): v for k, v in benchmark.peaks.bandwidth.items()},
    }
    content = {
        "facts": benchmark.facts,
        "peaks": peaks,
        "rows": records(benchmark),
        "accuracy": [
            {
                "stage": stage.stage,
                "precision": stage.precision,
                "figures": {figure.measure: figure.value for figure in stage.figures},
            }
            for stage in benchmark.accuracy
        ],
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"


def to_csv(benchmark: Benchmark) -> str:
    """One line per measurement, facts and peaks repeated in each, as llama-bench has it."""
    context = {**benchmark.facts, **peak_texts(benchmark)}
    lines = [{**record, **context} for record in records(benchmark)]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def to_markdown(benchmark: Benchmark) -> str:
    """Facts as a list, a table of as few columns as there are figures for, and the accuracy."""
    facts = {**benchmark.facts, **peak_texts(benchmark)}
    rows = [_cells(record) for record in records(benchmark)]
    names = [name for name in _HEADERS if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [f"- {name}: {text}" for name, text in facts.items()]
    lines += ["", _line({name: name for name in names}, widths), _rule(widths)]
    lines += [_line(row, widths) for row in rows]
    if benchmark.accuracy:
        lines += ["", "Against the checkpoint, as the exporter measured on a CPU:", ""]
        lines += [_accuracy(stage) for stage in benchmark.accuracy]
    return "\n".join(lines) + "\n"


def _accuracy(stage: StageParity) -> str:
    figures = ", ".join(f"{figure.measure} {figure.shown}" for figure in stage.figures)
    return f"- {stage.stage}{f' ({stage.precision})' if stage.precision else ''}: {figures}"


def _cells(record: Record) -> dict[str, str]:
    """One row as text, by the table's headers."""
    rate, floor, share = record["rate"], record["floor_ms"], record["floor_share"]
    shown = (
        record["stage"],
        record["parameters"],
        f"{_plus_minus(record['ms'], record['ms_deviation'])} ms/{record['per']}",
        ""
        if rate is None
        else f"{_plus_minus(rate, record['rate_deviation'])} {record['rate_unit']}",
        "" if floor is None else f"{_short(floor)} ms",
        record["floor_bound"] or "",
        "" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}",
        *(_megabytes(record[f"{name}_bytes"]) for name in _BYTES),
    )
    return dict(zip(_HEADERS, shown, strict=True))


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _plus_minus(value: float, deviation: float) -> str:
    return f"{_short(value)} ± {_short(deviation)}"


def _short(value: float) -> str:
    """Three digits, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _line(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    cells = (
        row[name].rjust(width) if name in _RIGHT else row[name].ljust(width)
        for name, width in widths.items()
    )
    return f"| {' | '.join(cells)} |"


def _rule(widths: Mapping[str, int]) -> str:
    cells = (
        "-" * (width + 1) + ":" if name in _RIGHT else "-" * (width + 2)
        for name, width in widths.items()
    )
    return f"|{'|'.join(cells)}|"
