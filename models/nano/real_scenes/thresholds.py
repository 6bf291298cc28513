"""Fit the detector's thresholds to held-out real images.

    python models/nano/real_scenes/thresholds.py ../shared/data --model BUNDLE --checkpoint FOLDER

On the images that `held_out.py` asks about (`labels.py` says what is trusted), the whole of each is
searched, and for every label that is boxed there are chosen: the low score that best tells images
that show it from images that do not, and the high one with the least error in counts of 1 to 20.
Both go into the checkpoint's config.json; other labels stay as they are. Never real_eval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from labels import CLASSES, Labelled, read

import lrs_edge

SCORES = np.round(np.arange(0.2, 0.801, 0.025), 3)
MOST_COUNTED = 20
LEAST_IMAGES = 8
"""Images of a kind without which nothing is fitted."""


def scores_of(engine: lrs_edge.Engine, data: Path, images: list[Labelled]) -> list[dict[str, list]]:
    """For every image the scores of the objects found, by label."""
    every = []
    for image in images:
        with engine.open(data / image.image) as scene:
            answer = scene.ask("What is this?", search="exhaustive", max_tokens=1)
        found: dict[str, list[float]] = {}
        for thing in answer.objects:
            found.setdefault(thing.label, []).append(thing.score)
        every.append(found)
    return every


def best(low: float, kept: list[float], shown: list[bool]) -> float:
    """The middle of the scores that tell best, balanced, what is shown from what is not."""
    best_scores, truth = np.array(kept), np.array(shown)
    told = [
        (best_scores[truth] >= score).mean() + (best_scores[~truth] < score).mean()
        for score in SCORES
    ]
    most = np.flatnonzero(np.array(told) >= max(told) - 1e-9)
    return max(float(SCORES[most[len(most) // 2]]), low)


def fit(
    name: str, low: float, high: float, images: list[Labelled], scores: list[dict[str, list]]
) -> tuple[float, float]:
    """Both thresholds of a label."""
    kept, shown, counted, counts = [], [], [], []
    for image, found in zip(images, scores, strict=True):
        own = found.get(name, [])
        if name in image.boxes or image.lacks(name):
            kept.append(max(own, default=0.0))
            shown.append(name in image.boxes)
        if image.is_whole(name) and 1 <= len(image.boxes.get(name, ())) <= MOST_COUNTED:
            counted.append(own)
            counts.append(len(image.boxes[name]))
    if min(sum(shown), len(shown) - sum(shown)) >= LEAST_IMAGES:
        low = best(low, kept, shown)
    if len(counts) >= LEAST_IMAGES:
        errors = [
            np.mean([min(abs(sum(s >= score for s in own) - true), 4)
                     for own, true in zip(counted, counts, strict=True)])
            for score in SCORES
        ]  # fmt: skip
        high = float(SCORES[int(np.argmin(errors))])
    return min(low, high), max(low, high)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with vhr10_rgb and the others")
    parser.add_argument("--model", type=Path, required=True, help="bundle of the checkpoint")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its config.json changes")
    options = parser.parse_args()
    path = options.checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    described = config["vision_objects"]
    images = read(options.data)
    scores = scores_of(lrs_edge.load(options.model), options.data, images)
    for place, name in enumerate(described["labels"]):
        if name in CLASSES:
            low, high = described["thresholds"][place]
            described["thresholds"][place] = fit(name, low, high, images, scores)
            print(f"{name}: {low}, {high} -> {described['thresholds'][place]}")
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
