"""CIDEr and BLEU-4 of a bundle's captions on RSICD's test images.

    pip install '.[cpu,captions]'
    python models/nano/train/captions.py --data ../shared/data [--bundle DIR] [--limit N]

Every test image goes through `lrs_edge` as a user's image would and is asked to be described; the
captions in `labels.jsonl` are the references. Scored by pycocoevalcap, the scorer of MS COCO. Its
tokenizer needs Java and is replaced by a plain one, words in lower case without punctuation, which
for these captions comes to the same.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from common import Paths, labels

import lrs_edge

QUESTION = "Describe the image."
#: RSICD's captions have 11 words on average, 34 at most.
MAX_TOKENS = 48


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Paths().data, help="folder with aid150_rsicd")
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    parser.add_argument("--limit", type=int, help="use every n-th image so that about N are left")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--output", type=Path, help="write every caption to this JSONL file")
    return parser.parse_args()


def words(text: str) -> str:
    """A caption as it is scored: lower case, words and numbers only, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower()))


def test_rows(data: Path, limit: int | None) -> list[dict[str, Any]]:
    """Labels of the test images that have captions."""
    rows = [
        row
        for row in labels(Paths(data=data), "aid150_rsicd")
        if row["split"] == "test" and row["captions"]
    ]
    return rows[:: max(len(rows) // limit, 1)] if limit else rows


def describe(options: argparse.Namespace, rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Name of the bundle, and its caption of every image."""
    found = []
    with lrs_edge.load(options.bundle) as engine:
        for row in rows:
            with engine.open(options.data / "aid150_rsicd" / row["file"]) as scene:
                found.append(scene.ask(options.question, max_tokens=MAX_TOKENS).text)
        return engine.manifest.name, found


def scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and CIDEr of the corpus; CIDEr's word weights come from these references."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    said = {place: [words(caption)] for place, caption in enumerate(captions)}
    right = {place: [words(text) for text in texts] for place, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(right, said, verbose=0)
    cider, _ = Cider().compute_score(right, said)
    return {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)} | {"CIDEr": float(cider)}


def main() -> None:
    """Describe every test image and print the scores."""
    options = arguments()
    rows = test_rows(options.data, options.limit)
    start = time.monotonic()
    name, captions = describe(options, rows)
    seconds = (time.monotonic() - start) / len(rows)
    if options.output:
        lines = (
            json.dumps({"file": row["file"], "caption": caption, "references": row["captions"]})
            for row, caption in zip(rows, captions, strict=True)
        )
        options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for row, caption in list(zip(rows, captions, strict=True))[:5]:
        print(f"{row['file']}: {caption}")
    found = scores(captions, [row["captions"] for row in rows])
    print(", ".join(f"{metric} {value:.3f}" for metric, value in found.items()))
    print(
        f"{name}: CIDEr {found['CIDEr']:.3f}, BLEU-4 {found['BLEU-4']:.3f} on {len(rows)} images "
        f"with {sum(len(row['captions']) for row in rows)} references ({options.question!r}, "
        f"{seconds:.2f} s per image)"
    )


if __name__ == "__main__":
    main()
