"""Dense against compact Region Focus Module on the same tiles of the same level.

Dense is what the reference computes: the level's whole padded sequence, zero tokens in the place of
tiles that were not read, kept out by an attention bias. Compact is what the runtime computes: the
tokens that are there, at positions with gaps. Both give the scores of the same tokens; they may
differ by `TOLERANCE` of the largest, or the exit code is 1. Levels grow, the tiles read do not.

Both sides take turns in one process for seconds (medians, the prompt's beginning already in the
cache, as it is for every level but the first); peak memory that scoring adds is measured in fresh
processes.

    python -m benchmarks.dense_rfm [--bundle DIR] [--tiles-along 3 5 6 8] [--selected 16]
        [--repeat N] [--threads N]

By default the bundle is exported at float32 from the embedded model's own weights, because in int8
the order of additions shows; tokens are those of examples/islands.tif resized to each level.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import (
    ROOT,
    default_threads,
    head,
    in_fresh_process,
    parser_for,
    peak_mib,
    reset_peak,
    row,
    times,
)
from lrs_edge.bundle.bundle import open_bundle
from lrs_edge.engines.base import BackendOptions
from lrs_edge.language.sequence import LocalTokens, pad_dense
from lrs_edge.pyramid.levels import build_pyramid, token_grid
from lrs_edge.raster.raster import Raster
from lrs_edge.requests.budget import Budget
from lrs_edge.requests.cache_pool import CachePool
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import AskOptions
from lrs_edge.search.context import spread
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.scorers import RfmScorer, ScoringCaches
from lrs_edge.stages import load_stages
from lrs_edge.vision.encoder import FeatureCache
from lrs_edge.vision.tiles import TileSource

QUESTION = "Where is the road?"
IMAGE = ROOT / "examples" / "islands.tif"
#: Of the largest score.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One level with some of its tiles, and what scores it.

    Attributes:
        scorer: The RFM, with the prompt's beginning in its cache.
        compact: Tokens of the tiles.
        dense: The same on the whole level.
        tiles: How many tiles the level has, and how many were read.
    """

    scorer: RfmScorer
    compact: LocalTokens
    dense: LocalTokens
    tiles: tuple[int, int]

    def score(self, how: str) -> NDArray[np.float32]:
        """Scores of the level's tokens in one of the two ways, float32 [n] of the compact ones."""
        if how == "compact":
            return token_scores(self.scorer.local(self.compact).local)
        hidden = self.dense.hidden if self.dense.hidden.any() else None
        scores = token_scores(self.scorer.local(self.dense).local, hidden)
        return scores[self.compact.indices]


def load_cases(bundle: Path | None, threads: int) -> Callable[[int, int], Case]:
    """Load a bundle.

    Returns:
        Makes the case of a square level of so many tiles along its side, of which so many are read.
    """
    stages = load_stages(open_bundle(bundle), BackendOptions("cpu", threads))
    manifest, focus = stages.manifest, stages.focus
    raster = Raster.open(IMAGE)
    source = TileSource(raster, stages.vision, FeatureCache(CachePool(1 << 30)))
    session = source.session("area", Clock(None), lambda *_: None)
    prompt = stages.prompt.tokens(QUESTION)
    tile = manifest.vision.tile

    def make(along: int, selected: int) -> Case:
        pyramid = build_pyramid(
            along * tile, along * tile, tile=tile, base_side=manifest.search.base_side
        )
        level = pyramid.levels[-1]
        view = session.global_tokens(pyramid.global_view)
        prefix, after = stages.sequences.prefix(view), stages.sequences.after(prompt.after, view)
        features = session.local_tokens(level, spread(level.tiles(), selected))
        grid = token_grid(level, stages.vision.per_tile, (level.height, level.width))
        compact = stages.sequences.local(grid, features, 1)
        budget = Budget(AskOptions(), Clock(None))
        scorer = RfmScorer(
            focus, stages.sequences, ScoringCaches(focus.new_cache()), prefix, after, budget
        )
        scorer.global_view()
        return Case(scorer, compact, pad_dense(compact, grid), (level.tile_count, len(features)))

    return make


def compare(case: Case, repeat: int) -> dict[str, Any]:
    """Scores and seconds of both ways, by turns."""
    seconds: dict[str, list[float]] = {"dense": [], "compact": []}
    scores: dict[str, NDArray[np.float32]] = {}
    for number in range(repeat + 1):
        for how, found in seconds.items():
            start = time.perf_counter()
            scores[how] = case.score(how)
            if number:
                found.append(time.perf_counter() - start)
    largest = float(scores["compact"].max())
    return {
        "tiles": case.tiles,
        "tokens": [len(case.dense), len(case.compact)],
        "difference": float(np.abs(scores["dense"] - scores["compact"]).max()) / largest,
        "dense": statistics.median(seconds["dense"]),
        "compact": statistics.median(seconds["compact"]),
    }


def added_memory(case: Case, how: str) -> dict[str, float]:
    """MiB by which scoring in one way raises the peak of this process, its graph loaded."""
    # Loads what one way alone needs: the dense graph is another one than the compact.
    first = case.compact.take(np.arange(2))
    first.hidden[:] = how == "dense"
    case.scorer.local(first)
    reset_peak()
    before = peak_mib()
    case.score(how)
    return {"mib": peak_mib() - before}


def run(
    bundle: Path | None, alongs: list[int], selected: int, repeat: int, threads: int
) -> list[dict[str, Any]]:
    """Measure every level and print a table."""
    columns = ["level", "tiles read", "tokens dense", "compact", "largest difference"]
    columns += ["dense, s", "compact, s", "ratio", "dense, MiB", "compact, MiB", "ratio"]
    print(head(columns))
    make = load_cases(bundle, threads)
    results = []
    for along in alongs:
        found = compare(make(along, selected), repeat)
        given = [] if bundle is None else ["--bundle", str(bundle.resolve())]
        given += ["--tiles-along", str(along), "--selected", str(selected)]
        for how in ("dense", "compact"):
            memory = in_fresh_process("dense_rfm", "--measure", how, *given)
            found[f"{how}_mib"] = memory["mib"]
        results.append(found)
        cells = [f"{along} x {along} tiles", found["tiles"][1], *found["tokens"]]
        cells += [f"{found['difference']:.1e}", f"{found['dense']:.3f}", f"{found['compact']:.3f}"]
        cells += [times(found["dense"], found["compact"]), f"{found['dense_mib']:.0f}"]
        cells += [f"{found['compact_mib']:.0f}", times(found["dense_mib"], found["compact_mib"])]
        print(row(cells), flush=True)
    return results


def main() -> None:
    """Export if need be, measure, print; exit code 1 where scores differ."""
    parser = parser_for(__doc__)
    parser.add_argument("--bundle", type=Path, help="default: the embedded model's weights, fp32")
    parser.add_argument("--tiles-along", type=int, nargs="+", default=[3, 5, 6, 8])
    parser.add_argument("--selected", type=int, default=16, help="tiles that are read")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--measure", choices=["dense", "compact"], help="added memory, as JSON")
    options = parser.parse_args()
    if options.measure:
        case = load_cases(options.bundle, options.threads)(options.tiles_along[0], options.selected)
        print(json.dumps(added_memory(case, options.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        bundle = options.bundle
        if bundle is None:
            from benchmarks.embedded_checkpoint import write_checkpoint
            from lrs_edge_export import ExportOptions, export_bundle

            folder = write_checkpoint(None, Path(name) / "checkpoint")
            bundle = export_bundle(
                str(folder), Path(name) / "fp32", ExportOptions(parity=False)
            ).path
        results = run(
            bundle, options.tiles_along, options.selected, options.repeat, options.threads
        )
    print(json.dumps(results))
    worst = max(found["difference"] for found in results)
    if worst >= TOLERANCE:
        raise SystemExit(f"scores differ by {worst:.1e} of the largest, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
