"""RSICD's test scenes as a question file for `lrs-edge eval`.

    python models/nano/train/scene_questions.py --data ../shared/data -o scenes.jsonl
    lrs-edge eval scenes.jsonl --images ../shared/data/aid150_rsicd -o results.jsonl --no-synonyms

One question per image, "What kind of place is this?", answered by the spoken name of its class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import SCENE_QUESTION, SCENES, Paths, is_dev, labels, write_atomically


def main() -> None:
    """Write the question file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Paths().data, help="folder with aid150_rsicd")
    parser.add_argument(
        "--split",
        choices=("test", "train", "dev"),
        default="test",
        help="which images; dev: those of train that nothing is trained on (default: test)",
    )
    parser.add_argument("--every", type=int, default=1, help="one image of so many")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    rows = [
        row
        for row in labels(Paths(data=options.data), "aid150_rsicd")
        if row["split"] == ("test" if options.split == "test" else "train")
        and (options.split != "dev" or is_dev(row["file"]))
    ][:: options.every]
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
