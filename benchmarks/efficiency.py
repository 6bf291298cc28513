"""Coarse-to-fine search against every tile: the paper's efficiency table in this runtime's terms.

Asks the same questions about the same images under the default search (`full`) and with
`--search exhaustive`, which looks at every tile of the finest level. Every run is a fresh process
with a fresh scene, so peak memory (`VmHWM`) is its own; the sides take turns; seconds are the
question's, the model being loaded, medians of `--repeat` runs. TFLOPs are those really computed, as
`lrs-edge eval` counts them (`lrs_edge/evaluation/flops.py`).

    python -m benchmarks.efficiency [--sides 4096 8192] [--image FILE ...] [--question Q ...]
        [--bundle DIR] [--repeat N] [--threads N]

By default the images are written here (GeoTIFF with overviews, smooth shapes). What an answer is
worth is another matter: `lrs-edge eval` scores both ways on real questions (docs/benchmarks.md).
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    default_threads,
    head,
    in_fresh_process,
    parser_for,
    peak_mib,
    row,
    times,
    write_image,
)

QUESTIONS = ("What kind of place is this?", "Is there a road?")
WAYS = {"full": "pyramid", "every tile": "exhaustive"}
#: What is compared, its column, and how it is shown.
COLUMNS = {
    "tiles": ("tiles", ".0f"),
    "encoded": ("vision tokens encoded", ".0f"),
    "sent": ("vision tokens to the LLM", ".0f"),
    "tflops": ("TFLOPs", ".3f"),
    "seconds": ("s", ".2f"),
    "peak_mib": ("peak MiB", ".0f"),
}


def ask(
    image: Path, question: str, search: str, bundle: Path | None, threads: int
) -> dict[str, Any]:
    """One question in this process; its figures."""
    import lrs_edge
    from lrs_edge.evaluation.flops import count_flops, graph_costs

    with lrs_edge.load(bundle, provider="cpu", threads=threads) as engine:
        before = engine.meter.read()
        answer = engine.open(image).ask(question, search=search, max_tokens=32)
        flops = count_flops(graph_costs(engine.manifest), engine.meter.since(before))
    looked_at = sum(level.tiles_encoded + level.tiles_from_cache for level in answer.levels)
    return {
        "tiles": 1 + looked_at,
        "encoded": answer.tokens.encoded,
        "sent": answer.tokens.sent,
        "tflops": None if flops is None else flops.total / 1e12,
        "seconds": answer.timings.total,
        "peak_mib": peak_mib(),
        "text": answer.text,
        "size": answer.image_size,
    }


def compare(image: Path, question: str, repeat: int, given: list[str]) -> dict[str, Any]:
    """Both ways by turns: the last run's figures with median seconds and the largest peak."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way, search in WAYS.items():
            command = ["--measure", search, "--image", str(image.resolve())]
            found = in_fresh_process("efficiency", *command, "--question", question, *given)
            runs[way].append(found)
    merged = {}
    for way, taken in runs.items():
        seconds = statistics.median(run["seconds"] for run in taken)
        peak = max(run["peak_mib"] for run in taken)
        merged[way] = {**taken[-1], "seconds": seconds, "peak_mib": peak}
    return merged


def shown(figures: dict[str, Any], key: str) -> str:
    """One figure for the table; a dash where the bundle's manifest lacks the sizes."""
    return "-" if figures[key] is None else format(figures[key], COLUMNS[key][1])


def print_rows(image: Path, question: str, ways: dict[str, Any]) -> None:
    """Rows of both ways and of their ratio."""
    full, every = ways["full"], ways["every tile"]
    width, height = full["size"]
    about = [f"{image.name}, {width:,} x {height:,}", question]
    for way, figures in ways.items():
        print(row([*about, way, *(shown(figures, key) for key in COLUMNS)]))
    ratios = [
        "-" if every[key] is None or full[key] is None else times(every[key], full[key])
        for key in COLUMNS
    ]
    print(row([*about, "ratio", *ratios]), flush=True)


def main() -> None:
    """Write the images, ask, print a table and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--image", type=Path, nargs="+", help="instead of generated images")
    parser.add_argument("--question", nargs="+", default=list(QUESTIONS))
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--measure", choices=[*WAYS.values()], help="one way, as JSON")
    options = parser.parse_args()
    if options.measure:
        if not options.image:
            parser.error("--measure needs --image")
        image, question = options.image[0], options.question[0]
        figures = ask(image, question, options.measure, options.bundle, options.threads)
        print(json.dumps(figures))
        return
    given = ["--threads", str(options.threads)]
    given += [] if options.bundle is None else ["--bundle", str(options.bundle.resolve())]
    columns = [title for title, _ in COLUMNS.values()]
    print(head(["image", "question", "search", *columns]))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for image in options.image or [Path(folder) / f"{side}.tif" for side in options.sides]:
            if options.image is None:
                write_image(image, int(image.stem), overviews=True)
            for question in options.question:
                ways = compare(image, question, options.repeat, given)
                results.append({"image": image.name, "question": question, **ways})
                print_rows(image, question, ways)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
