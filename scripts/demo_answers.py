"""Ask the questions of `examples/questions.jsonl`, and write what README.md says and shows of them.

    python scripts/demo_answers.py            # write README.md's parts and docs/search.png
    python scripts/demo_answers.py --check    # write nothing; exit 1 where README.md is stale

To be run after every change of the embedded model. The first question is the demo's: its search is
the picture, `scripts/dev.py demo` asks it, and a test wants its answer to be right. Truths and
boxes were found by eye and stand in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lrs_edge
from lrs_edge.answer import report
from lrs_edge.pyramid.box import Box

try:
    from scripts import draw_search
except ImportError:  # started as a file
    import draw_search  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "search.png"

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Reply:
    """What the model said to a question of the file.

    Attributes:
        question: The row of the file.
        answer: The answer, as `lrs-edge ask --format json` writes it.
    """

    question: dict[str, Any]
    answer: dict[str, Any]

    @property
    def right(self) -> bool:
        """Whether the answer is the true one."""
        return str(self.answer["answer"]).strip().lower() == self.question["ground_truth"]

    @property
    def looked_at(self) -> bool | None:
        """Whether a tile of the finest level lies over what is asked about; None if nothing is."""
        finest = self.answer["levels"][-1]["level"]
        tiles = [part["window"] for part in self.answer["regions"] if part["level"] == finest]
        centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes(self.question)]
        if not centres:
            return None
        return any(x0 <= x < x1 and y0 <= y < y1 for x, y in centres for x0, y0, x1, y1 in tiles)


def main(arguments: list[str] | None = None) -> int:
    """Ask all, then write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write what README.md says of the examples.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args(arguments).check
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        replies = ask(questions(), trace)
        with np.load(trace) as arrays:
            picture = draw_search.draw(
                replies[0].answer, dict(arrays), next(iter(boxes(replies[0].question)), None)
            )
    old = README.read_text(encoding="utf-8")
    new = replaced(old, "demo-picture", caption(replies[0]))
    new = replaced(new, "demo-answers", table(replies))
    for reply in replies:
        verdict = "right" if reply.right else f"wrong, {reply.question['ground_truth']}"
        print(f"{reply.question['image']}: {reply.question['text']} "
              f"{reply.answer['answer']} ({verdict})")  # fmt: skip
    if check:
        print("README.md is up to date" if new == old else "README.md is not up to date")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    picture.quantize(draw_search.COLOURS).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {picture.width}x{picture.height}, {PICTURE.stat().st_size:,} bytes")
    return 0


def questions() -> list[dict[str, Any]]:
    """The rows of the file, the demo's first."""
    lines = (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def boxes(question: dict[str, Any]) -> list[Box]:
    """Where that lies which a question is about, in pixels of the image; empty if nowhere."""
    found = question["hbox"]
    if not found:
        return []
    return [tuple(box) for box in (found if isinstance(found[0], list) else [found])]


def ask(rows: list[dict[str, Any]], trace: Path) -> list[Reply]:
    """The embedded model's replies, in the file's order, as `lrs-edge ask` gives them."""
    replies = []
    with ExitStack() as opened:
        engine = opened.enter_context(lrs_edge.load(provider="cpu"))
        scenes = {
            name: opened.enter_context(engine.open(EXAMPLES / name))
            for name in {row["image"] for row in rows}
        }
        for number, row in enumerate(rows):
            scene = scenes[row["image"]]
            answer = scene.ask(row["text"], trace=None if number else trace)
            path = str(EXAMPLES / row["image"])
            facts = report.ImageFacts(path, scene.raster.width, scene.raster.height)
            replies.append(Reply(row, json.loads(report.to_json(answer, facts))))
    return replies


def replaced(text: str, name: str, part: str) -> str:
    """A text with other lines between `<!-- NAME ... -->` and `<!-- /NAME -->`."""
    pattern = rf"(<!-- {name}\b.*?-->\n).*?(\n<!-- /{name} -->)"
    new, count = re.subn(pattern, lambda match: f"{match[1]}\n{part}\n{match[2]}", text, flags=re.S)
    if count != 1:
        parts = f"{count} parts" if count else "no part"
        raise SystemExit(f"README.md holds {parts} named {name}; one is needed")
    return new


def caption(reply: Reply) -> str:
    """The picture of a search, and what it shows."""
    answer, image = reply.answer, reply.answer["image"]
    finer = answer["levels"][1:]
    seen = sum(region["level"] > answer["levels"][0]["level"] for region in answer["regions"])
    total = sum(level["tile_rows"] * level["tile_cols"] for level in finer)
    levels = NUMBERS[len(answer["levels"])]
    found = {
        True: "the search found it",
        False: "the search did not get there",
        None: "there is no place to find",
    }[reply.looked_at]
    which = "the finer level" if len(finer) == 1 else f"the {NUMBERS[len(finer)]} finer levels"
    shown = f"the tiles looked at on {levels} levels with the tokens kept"
    return f"""\
![Question, {shown}, and the answer](docs/search.png)

*A real scene of {image["width"]:,} x {image["height"]:,} pixels,
`examples/{reply.question["image"]}`, which the model was not trained on. Lit tiles were looked at,
{seen} of the {total} on {which}; yellow tokens were kept.
Framed: {reply.question["seen"]}; {found}.*"""


def table(replies: list[Reply]) -> str:
    """The demo's command, and all questions with their true answers."""
    first = replies[0].question
    right = sum(reply.right for reply in replies)
    sure = any(confidence(reply) for reply in replies)
    heads = ["image", "question", "what is there", "the model says", "looked there"]
    heads += ["confidence"] * sure
    return "\n".join([
        "```sh",
        f'lrs-edge ask examples/{first["image"]} "{first["text"]}"',
        "```",
        "",
        f"{right} of these {len(replies)} answers are right:",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(table_row(reply, sure=sure) for reply in replies),
    ])  # fmt: skip


def table_row(reply: Reply, *, sure: bool) -> str:
    """One question of the table; with a column of confidence where the bundle is calibrated."""
    question = reply.question
    cells = [
        f"`{question['image']}`",
        question["text"],
        f"{question['ground_truth']}: {question['seen']}",
        reply.answer["answer"].strip() + ("" if reply.right else " (**wrong**)"),
        {True: "yes", False: "no", None: ""}[reply.looked_at],
    ]
    cells += [confidence(reply)] * sure
    return f"| {' | '.join(cells)} |"


def confidence(reply: Reply) -> str:
    """How sure the model is, in words; empty where its bundle is not calibrated."""
    value = reply.answer.get("confidence")
    return "" if value is None else f"{value:.0%}".replace("%", " %")


if __name__ == "__main__":
    sys.exit(main())
