"""What a scene remembers: a question on a fresh scene against the same question on a used one.

Both sides run in one process with a loaded model, `--repeat` times in turn; answers must be equal.

    python -m benchmarks.second_question IMAGE [--bundle DIR] [--repeat 5]
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import lrs_edge
from benchmarks.measure import parser_for

QUESTION, OTHER = "What kind of place is this?", "Is there a road?"


def main() -> None:
    """Ask, and print medians, the ratio and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--bundle", help="default: the embedded model")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    fresh: list[float] = []
    used: list[float] = []
    with lrs_edge.load(options.bundle) as engine:
        for _ in range(options.repeat):
            with engine.open(options.image) as scene:
                first = scene.ask(QUESTION)
                scene.ask(OTHER)
                second = scene.ask(QUESTION)
            if first.token_ids != second.token_ids:
                raise SystemExit("the remembered scene gave another answer")
            fresh.append(first.timings.total)
            used.append(second.timings.total)
    medians = statistics.median(fresh), statistics.median(used)
    print(f"first question {medians[0]:.2f} s, later question {medians[1]:.2f} s")
    print(f"ratio {medians[0] / medians[1]:.1f}")
    print(json.dumps({"image": str(options.image), "first": fresh, "later": used}))


if __name__ == "__main__":
    main()
