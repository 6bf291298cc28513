"""Seconds a question takes with one bundle and with another, in turns in one process.

Beside seconds that passed, seconds of processor time, which other work on the machine changes less
(best with one thread: waiting ones count as well).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from tables import table

import lrs_edge

QUESTIONS = ("Are there any airplanes?", "How many ships are there?")
"""The first of a scene, and a later one about it."""
LARGE = "dubai_cc0/images/scene7.webp"


def scenes(data: Path) -> tuple[Path, Path]:
    """A scene of 2,560 pixels and one of about 6,000.

    Raises:
        OSError: real_eval is not there.
    """
    smaller = min((data / "real_eval" / "images").glob("airbus_*"))
    return smaller, data / LARGE


def seconds(engine: lrs_edge.Engine, scene: Path) -> tuple[float, float, float, float]:
    """Of the first question about a scene, its opening included, and of a later one.

    Returns:
        Seconds that passed, for both, then of processor time.
    """
    begin, work = perf_counter(), process_time()
    with engine.open(scene) as opened:
        opened.ask(QUESTIONS[0])
        between, work_between = perf_counter(), process_time()
        opened.ask(QUESTIONS[1])
        end, work_end = perf_counter(), process_time()
    return between - begin, end - between, work_between - work, work_end - work_between


def compare_cost(
    engine: lrs_edge.Engine, other: lrs_edge.Engine, data: Path, path: Path, turns: int
) -> str:
    """Ask both bundles in turns; what an earlier run measured is not measured again.

    Args:
        engine: The bundle.
        other: What it is compared with.
        data: Folder with real_eval and dubai_cc0.
        path: File of the seconds measured, for these two bundles.
        turns: On each scene, after one that is not counted.

    Returns:
        A Markdown table: medians and their ratios.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for scene in scenes(data):
        known = [row for row in measured if row["scene"] == scene.name]
        if len(known) >= turns:
            continue
        seconds(engine, scene), seconds(other, scene)
        for turn in range(len(known), turns):
            # Whoever comes first finds the processor cooler: it changes.
            order = (("this", engine), ("other", other))[:: 1 if turn % 2 else -1]
            row = {"scene": scene.name, **{name: seconds(each, scene) for name, each in order}}
            measured.append(row)
            with path.open("a") as stream:
                stream.write(f"{json.dumps(row)}\n")
    return cost_table(measured)


def cost_table(measured: Sequence[dict[str, Any]]) -> str:
    """Medians of all turns, and the ratio of this bundle to the other."""
    rows = []
    for scene in dict.fromkeys(str(row["scene"]) for row in measured):
        some = [row for row in measured if row["scene"] == scene]
        for place, name in enumerate(("first question", "a later one")):
            line = [scene, name]
            for at in (place, place + 2):
                this, other = (median(row[who][at] for row in some) for who in ("this", "other"))
                line += [f"{this:.2f}", f"{other:.2f}", f"{this / other:.2f}"]
            rows.append(line)
    head = ["scene", "question", "this bundle, s", "the other, s", "ratio"]
    head += ["processor time, s", "the other's, s", "ratio"]
    return f"**Cost per question, in turns**\n\n{table(head, rows)}"
