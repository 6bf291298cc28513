"""Two checkouts of lrs-edge side by side: whole questions, in processes that take turns.

    python -m benchmarks.two_checkouts OLD_PYTHON NEW_PYTHON IMAGE [--old BUNDLE] [--new BUNDLE]

The two Pythons are those of environments in which either checkout is installed. Every process loads
the model, opens the image and asks the same question twice and another one. Prints medians of
`--repeat` turns and ratios, and one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path

from benchmarks.measure import head, parser_for

#: Uses the public interface alone, which both sides have.
CHILD = """
import json, sys, time
start = time.perf_counter()
import lrs_edge
engine = lrs_edge.load(sys.argv[2] or None, provider="cpu")
found = {"load": time.perf_counter() - start}
start = time.perf_counter()
scene = engine.open(sys.argv[1])
found["open"] = time.perf_counter() - start
questions = {"first": "What kind of place is this?", "again": "What kind of place is this?",
             "other": "Is there a road?"}
for name, question in questions.items():
    start = time.perf_counter()
    answer = scene.ask(question)
    found[name] = time.perf_counter() - start
    if name == "first":
        for step in ("read", "encode", "score", "prefill", "decode"):
            found["first: " + step] = getattr(answer.timings, step)
print(json.dumps(found))
"""


def measure(python: str, image: Path, bundle: str) -> dict[str, float]:
    """Seconds of one process.

    Raises:
        CalledProcessError: It failed; its own message stands on standard error.
    """
    command = [python, "-c", CHILD, str(image.resolve()), bundle]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("old_python")
    parser.add_argument("new_python")
    parser.add_argument("image", type=Path)
    parser.add_argument("--old", default="", help="bundle of the old side; default: its own")
    parser.add_argument("--new", default="", help="bundle of the new side; default: its own")
    parser.add_argument("-r", "--repeat", type=int, default=9, help="turns")
    options = parser.parse_args()
    sides = {"old": (options.old_python, options.old), "new": (options.new_python, options.new)}
    runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for _ in range(options.repeat):
        for side, (python, bundle) in sides.items():
            runs[side].append(measure(python, options.image, bundle))
    print(head(("what", "old, s", "new, s", "new / old")))
    rows = {}
    for name in runs["old"][0]:
        old, new = (statistics.median(run[name] for run in runs[side]) for side in sides)
        rows[name] = {"old": old, "new": new, "ratio": new / old}
        print(f"| {name} | {old:.4f} | {new:.4f} | {new / old:.2f} |")
    print(json.dumps({"benchmark": "two_checkouts", "repeat": options.repeat, "rows": rows}))


if __name__ == "__main__":
    main()
