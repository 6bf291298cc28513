"""The embedded model's figures: every run of `lrs-edge eval` that its card reports, as one table.

    lrs-edge scenes DATA/aid150_rsicd -o SCENES --split test ...    (see MODEL_CARD.md)
    python models/nano/figures.py SCENES --work RESULTS [--untrained BUNDLE] [--fp32 BUNDLE]

Every row is one results file in RESULTS; a run that was interrupted goes on. `--only rfm,norm` runs
some rows, `--tiles-per-level` sets the budget that the searches share.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One run: its name, how it is asked for, and which bundle it takes."""

    name: str
    about: str
    options: tuple[str, ...] = ()
    bundle: str = "model"


ROWS = (
    Row("rfm", "trained RFM, coarse to fine (`full`)"),
    Row("global", "global view only", ("--max-tiles", "0")),
    Row(
        "exhaustive", "every tile at full resolution, scored by the RFM", ("--search", "exhaustive")
    ),
    Row("none", "no pruning: every tile of the finest level that fits", ("--prune", "none")),
    Row("fastv", "the same, half dropped in the LLM (FastV)", ("--prune", "fastv")),
    Row("random", "random scores in place of the RFM", ("--prune", "random")),
    Row("norm", "token norm in place of the RFM", ("--prune", "norm")),
    Row("untrained", "untrained RFM", (), "untrained"),
    Row("fp32", "trained RFM, fp32 engines", (), "fp32"),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", type=Path, help="folder that `lrs-edge scenes` wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the results files")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--untrained", type=Path, help="bundle whose RFM was not trained")
    parser.add_argument("--fp32", type=Path, help="the same model exported with --precision fp32")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--limit", type=int, help="the first so many questions only")
    parser.add_argument("--tiles-per-level", type=int, default=12)
    parser.add_argument("--threads", type=int, help="threads of one run")
    return parser.parse_args()


def run(row: Row, options: argparse.Namespace) -> dict[str, Any] | None:
    """One row's figures; None where its bundle was not given."""
    bundle: Path | None = getattr(options, row.bundle)
    if bundle is None and row.bundle != "model":
        return None
    limited = f".{options.limit}" if options.limit else ""
    command = [
        str(Path(sys.executable).with_name("lrs-edge")), "eval",
        str(options.scenes / "questions.jsonl"), "--images", str(options.scenes),
        "-o", str(options.work / f"{row.name}{limited}.jsonl"), "--format", "json", "--no-synonyms",
        "--tiles-per-level", str(options.tiles_per_level), "--max-tokens", "12", *row.options,
        *(["--model", str(bundle)] if bundle else []),
        *(["--limit", str(options.limit)] if options.limit else []),
        *(["--threads", str(options.threads)] if options.threads else []),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def line(row: Row, figures: dict[str, Any]) -> str:
    """One line of the table."""
    overall, cost, regions = figures["overall"], figures["cost"], figures["regions"]
    cells = [
        row.about,
        f"{100 * overall['accuracy']:.1f} % ({overall['correct']}/{overall['questions']})",
        f"{100 * regions['recall']:.1f} %",
        f"{100 * regions['random_recall']:.1f} %",
        f"{cost['tiles']:.0f}",
        f"{cost['seconds']['total']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is not there yet, and print the table and the categories."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    wanted = None if options.only is None else set(options.only.split(","))
    found: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        if wanted is None or row.name in wanted:
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            figures = run(row, options)
            if figures is not None:
                found[row.name] = figures
    print("| run | accuracy | region recall | of random tiles | tiles | s per question |")
    print("|---|---|---|---|---|---|")
    for row in ROWS:
        if row.name in found:
            print(line(row, found[row.name]))
    kinds = sorted({kind for figures in found.values() for kind in figures["categories"]})
    print(f"\n| run | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, figures in found.items():
        groups = figures["categories"]
        shares = [f"{groups[kind]['correct']}/{groups[kind]['questions']}" for kind in kinds]
        print(f"| {name} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
