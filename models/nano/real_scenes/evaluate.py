"""The embedded model on real scenes: what its card reports, as Markdown.

    python models/nano/real_scenes/evaluate.py ../shared/data --work FOLDER
        [--model BUNDLE] [--only real,water] [--limit N] [--against OTHER_BUNDLE]

Parts: `real` (real_eval: presence, side, count, airplanes under tiles), `finer` (the latter with 24
tiles a level), `global` (presence from the global view alone), `water` (ships on open water),
`dubai` (three scenes that were not trained on), `blind` (all those questions about a grey image),
`cost` (seconds a question beside another bundle, with --against). Every run of questions has its
results file in FOLDER, named after the bundle: an interrupted evaluation goes on, and another
bundle has files of its own. Real_eval is evaluation only: nothing is fitted to it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tables
import water
from asking import Asker, Run, read_rows, write_rows
from cost import compare_cost
from PIL import Image
from summary import summary

import lrs_edge
from lrs_edge.bundle.bundle import MANIFEST_NAME, default_bundle_path
from lrs_edge.evaluation.results import Result
from lrs_edge.pyramid.levels import build_pyramid
from lrs_edge.requests.options import AskOptions

PARTS = ("real", "finer", "global", "water", "dubai", "blind", "cost")
DUBAI = Path(__file__).with_name("dubai.jsonl")
GREY = (127, 127, 127)
LARGE = "airbus"
"""Source of real_eval's scenes of 2,560 pixels."""
FINER_TILES = 24


class Evaluation:
    """The parts, each asking what it needs.

    Args:
        data: Folder with real_eval, vhr10_rgb and dubai_cc0.
        work: Folder of made scenes and question files.
        asker: The bundle.
    """

    def __init__(self, data: Path, work: Path, asker: Asker) -> None:
        self._data = data
        self._work = work
        self._asker = asker
        self._real = data / "real_eval"
        self._blind: dict[str, str] | None = None
        self._done: dict[str, list[Result]] = {}

    def summary(self) -> str:
        """One table of what the parts so far have found; "" where that is nothing."""
        return "" if not self._done else summary(self._done, self.blind(), self._asker.tile)

    def blind(self) -> dict[str, str]:
        """Answers to every wording about a grey image as large as real_eval's usual ones."""
        if self._blind is None:
            rows = read_rows(self._real / "questions.jsonl")
            sizes = Counter(self._size(row["image"]) for row in rows if row["source"] != LARGE)
            (width, height), _ = sizes.most_common(1)[0]
            folder, name = self._work / "blind", f"grey_{width}x{height}.png"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                Image.new("RGB", (width, height), GREY).save(folder / name)
            wordings = [row["text"] for row in (*rows, *read_rows(DUBAI))] + [water.QUESTION]
            asked = [
                {
                    "question_id": f"blind-{number:03}", "image": name, "category": "blind",
                    "text": text, "ground_truth": "none", "hbox": [],
                }
                for number, text in enumerate(dict.fromkeys(wordings))
            ]  # fmt: skip
            run = Run("blind", write_rows(folder / "questions.jsonl", asked), folder, whole=True)
            self._blind = {result.prompt: result.text for result in self._asker.ask(run)}
        return self._blind

    def _size(self, image: str) -> tuple[int, int]:
        with Image.open(self._real / image) as opened:
            return opened.size

    def real(self, blind: dict[str, str]) -> str:
        """Presence, side, count and airplanes under tiles, by default options."""
        run = Run("real", self._real / "questions.jsonl", self._real)
        results = self._asker.ask(run)
        first = [result for result in results if not result.question_id.startswith(LARGE)]
        large = self._large(results)
        self._done |= {"real": first, "large": large}
        parts = [
            tables.presence_table(first, blind),
            tables.side_table(first, blind),
            tables.count_table(first, blind),
            tables.tiles_table("Airplanes under the finest level's tiles", large, self._asker.tile),
        ]
        return "\n\n".join(parts)

    def finer(self) -> str:
        """Airplanes under tiles with more tiles a level."""
        rows = [
            row
            for row in read_rows(self._real / "questions.jsonl")
            if row["source"] == LARGE and row["category"] == "presence"
        ]
        questions = write_rows(self._work / "large" / "questions.jsonl", rows)
        run = Run("finer", questions, self._real, AskOptions(tiles_per_level=FINER_TILES))
        title = f"The same with {FINER_TILES} tiles a level"
        results = self._done["finer"] = self._asker.ask(run)
        return tables.tiles_table(title, results, self._asker.tile)

    def global_view(self, blind: dict[str, str]) -> str:
        """Presence from the global view alone."""
        rows = [
            row
            for row in read_rows(self._real / "questions.jsonl")
            if row["source"] != LARGE and row["category"] == "presence"
        ]
        questions = write_rows(self._work / "presence" / "questions.jsonl", rows)
        run = Run("global", questions, self._real, AskOptions(max_tiles=0))
        return tables.presence_table(self._asker.ask(run), blind, "global view alone")

    @staticmethod
    def _large(results: Sequence[Result]) -> list[Result]:
        return [
            result
            for result in results
            if result.question_id.startswith(LARGE) and result.category == "presence"
        ]

    def water(self, blind: dict[str, str]) -> str:
        """Ships on open water, at half of the finest level's tiles."""
        folder = self._work / "water"
        rows = read_rows(water.write(self._data, folder))
        manifest = self._asker.engine.manifest
        by_tiles: dict[int, list[dict[str, object]]] = {}
        for row, plan in zip(rows, water.PLANS, strict=True):
            pyramid = build_pyramid(
                plan.height,
                plan.width,
                tile=manifest.vision.tile,
                base_side=manifest.search.base_side,
            )
            by_tiles.setdefault(max(1, pyramid.levels[-1].tile_count // 2), []).append(row)
        results: list[Result] = []
        for count, some in sorted(by_tiles.items()):
            questions = write_rows(folder / f"questions_{count}.jsonl", some)
            options = AskOptions(tiles_per_level=count)
            results += self._asker.ask(Run(f"water_{count}", questions, folder, options))
        self._done["water"] = results
        return tables.water_table(results, blind, self._asker.tile)

    def dubai(self, blind: dict[str, str]) -> str:
        """Scenes of Dubai that were not trained on."""
        run = Run("dubai", DUBAI, self._data / "dubai_cc0")
        results = self._done["dubai"] = self._asker.ask(run)
        return tables.dubai_table(results, blind)

    def part(self, name: str) -> str:
        """The tables of one part."""
        if name == "finer":
            return self.finer()
        if name == "blind":
            return tables.blind_table(self.blind())
        made = {
            "real": self.real,
            "global": self.global_view,
            "water": self.water,
            "dubai": self.dubai,
        }
        return made[name](self.blind())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with real_eval, vhr10_rgb and dubai_cc0")
    parser.add_argument("--work", type=Path, required=True, help="folder of scenes and results")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--against", type=Path, help="bundle that the cost is compared with")
    parser.add_argument("--only", help=f"parts, separated by commas, of {','.join(PARTS)}")
    parser.add_argument("--limit", type=int, help="the first so many questions of each run only")
    parser.add_argument("--turns", type=int, default=3, help="of the cost (default: 3)")
    parser.add_argument("--threads", type=int, help="threads of the engines")
    options = parser.parse_args()
    wanted = PARTS if options.only is None else tuple(options.only.split(","))
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    if options.only and "cost" in wanted and options.against is None:
        parser.error("cost needs --against OTHER_BUNDLE")
    options.parts = [part for part in PARTS if part in wanted]
    return options


def identity(bundle: Path | None) -> str:
    """The beginning of the SHA-256 of a bundle's manifest, which holds its files' hashes."""
    root = default_bundle_path() if bundle is None else bundle
    return hashlib.sha256((root / MANIFEST_NAME).read_bytes()).hexdigest()[:12]


def main() -> None:
    """Run what is not there yet, and print every part's tables as they come."""
    options = arguments()
    name = identity(options.model)
    results = options.work / "results" / name
    with lrs_edge.load(options.model, provider="cpu", threads=options.threads) as engine:
        asker = Asker(engine, options.model, results, options.limit)
        evaluation = Evaluation(options.data, options.work, asker)
        print(f"# Bundle {name}, {engine.manifest.name}\n", flush=True)
        for part in options.parts:
            if part != "cost":
                print(f"{part} ...", file=sys.stderr, flush=True)
                print(f"{evaluation.part(part)}\n", flush=True)
        print(f"{evaluation.summary()}\n", flush=True)
        if "cost" in options.parts and options.against is not None:
            with lrs_edge.load(options.against, provider="cpu", threads=options.threads) as other:
                measured = results / f"cost_{identity(options.against)}.jsonl"
                print(compare_cost(engine, other, options.data, measured, options.turns))


if __name__ == "__main__":
    main()
