"""RSICD's test scenes as a question file for `lrs-edge eval`.

    python models/nano/train/scene_questions.py --data ../shared/data -o scenes.jsonl
    lrs-edge eval scenes.jsonl --images ../shared/data/aid150_rsicd -o results.jsonl --no-synonyms

One question per image, "What kind of place is this?", answered by the spoken name of its class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import SCENE_QUESTION, SCENES, Paths, labels, write_atomically


def main() -> None:
    """Write the question file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Paths().data, help="folder with aid150_rsicd")
    parser.add_argument("--split", default="test", help="which images (default: test)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    rows = [
        row
        for row in labels(Paths(data=options.data), "aid150_rsicd")
        if row["split"] == options.split
    ]
    lines = [
        json.dumps(
            {
                "question_id": f"RSICD_{Path(row['file']).stem}",
                "image": row["file"],
                "category": "scene",
                "text": SCENE_QUESTION,
                "ground_truth": SCENES[row["scene"]],
                "hbox": [],
            }
        )
        for row in rows
    ]
    write_atomically(options.output, "".join(f"{line}\n" for line in lines))
    print(f"{options.output}: {len(lines)} questions")


if __name__ == "__main__":
    main()
