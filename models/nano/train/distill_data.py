"""Questions with evidence boxes for `lrs-edge distill`: large scenes and photographs.

    python distill_data.py SCENES OUT [--photos 300]

SCENES is a folder that `lrs-edge scenes` wrote from the training split. OUT gets questions.jsonl in
the form of LRS-VQA, and links to (or copies of) the scenes and of some training photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Paths
from pictures import photographs
from questions import object_questions

QUESTIONS = 4
"""On each photograph."""


def photo_lines(paths: Paths, count: int, out: Path) -> Iterator[dict[str, Any]]:
    """Questions on photographs; their boxes in pixels."""
    draw = random.Random(3)
    pictures = [p for p in photographs(paths) if p.split == "train" and not p.mirrored]
    for picture in draw.sample(pictures, min(count, len(pictures))):
        name = f"photos/{Path(picture.source).name}"
        placed(paths.data / picture.source, out / name)
        described = picture.as_dict()
        asked = [q for q in object_questions(described, draw, 3 * QUESTIONS) if q.evidence]
        for number, question in enumerate(asked[:QUESTIONS]):
            boxes = [picture.regions[i]["box"] for i in question.evidence]
            size = (picture.width, picture.height) * 2
            yield {
                "question_id": f"{Path(name).stem}_{number}",
                "image": name,
                "category": question.kind,
                "text": question.text,
                "ground_truth": question.answer,
                "hbox": [[round(v * s, 1) for v, s in zip(b, size, strict=True)] for b in boxes],
            }


def scene_lines(scenes: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Questions on large scenes, their images under another name."""
    for text in (scenes / "questions.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        name = f"scenes/{Path(line['image']).name}"
        placed(scenes / line["image"], out / name)
        yield {**line, "image": name}


def placed(source: Path, target: Path) -> None:
    """A hard link, or a copy where that is not possible."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=int, default=300)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [*scene_lines(options.scenes, options.out)]
    lines += photo_lines(Paths(), options.photos, options.out)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (options.out / "questions.jsonl").write_text(text, encoding="utf-8")
    print(f"{options.out}: {len(lines)} questions")


if __name__ == "__main__":
    main()
