"""The held-out figure of the shipped bundle: RSICD test scenes named through the runtime.

    python models/nano/train/evaluate_bundle.py --data ../shared/data [--bundle DIR] [--limit N]

Every test image goes through `lrs_edge` as a user's image would: raster, pyramid, RFM, selection,
KV cache, greedy decoding. An answer counts when it is exactly the name of the image's class.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from common import SCENE_QUESTION, SCENES, Paths, labels

import lrs_edge


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Paths().data, help="folder with aid150_rsicd")
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    parser.add_argument("--limit", type=int, help="use every n-th image so that about N are left")
    parser.add_argument("--policy", choices=["full", "reference"], default="full")
    return parser.parse_args()


def main() -> None:
    """Name every held-out scene and print the share that is right."""
    options = arguments()
    rows = [
        row for row in labels(Paths(data=options.data), "aid150_rsicd") if row["split"] == "test"
    ]
    if options.limit:
        rows = rows[:: max(len(rows) // options.limit, 1)]
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    confusions: Counter[tuple[str, str]] = Counter()
    start = time.monotonic()
    with lrs_edge.load(options.bundle) as engine:
        for row in rows:
            with engine.open(options.data / "aid150_rsicd" / row["file"]) as scene:
                answer = scene.ask(SCENE_QUESTION, policy=options.policy, max_tokens=12)
            wanted, found = SCENES[row["scene"]], answer.text.strip().lower().rstrip(".")
            total[wanted] += 1
            right[wanted] += found == wanted
            if found != wanted:
                confusions[wanted, found] += 1
        name = engine.manifest.name
    for scene in sorted(total, key=lambda scene: right[scene] / total[scene]):
        print(f"{scene:26} {right[scene]:3} of {total[scene]:3}")
    for (wanted, found), count in confusions.most_common(10):
        print(f"{count:3} x {wanted} taken for {found}")
    seconds = (time.monotonic() - start) / len(rows)
    share = 100 * right.total() / total.total()
    print(
        f"{name}: {right.total()} of {total.total()} held-out scenes named right = {share:.1f} % "
        f"({len(SCENES)} classes, {options.policy} policy, {seconds:.2f} s per image)"
    )


if __name__ == "__main__":
    main()
