"""One side of `benchmarks.against_reference` in a process of its own, asked line by line.

    python -m benchmarks.reference_worker torch CHECKPOINT --threads N [--keep KEEP] [--batch N]
    python -m benchmarks.reference_worker full|reference BUNDLE --threads N

Loads the model, says `{"ready": true}`, then answers every line of standard input, a JSON object
with `image` (opened anew where it is given), `question` and `max_tokens`, with one line of figures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import parser_for, peak_mib

#: What the PyTorch side keeps of an image between two questions.
KEEPS = ("nothing", "decoded", "levels")

#: Answers a question: image or None for the last one, question, most tokens.
Ask = Callable[[Path | None, str, int], dict[str, Any]]


def torch_side(folder: Path, keep: str, batch: int | None, threads: int) -> Ask:
    """The reference in PyTorch, `batch` tiles at once (None: all)."""
    import torch

    torch.set_num_threads(threads)
    from benchmarks.reference_torch import Reference
    from benchmarks.reference_torch.image import decode

    reference = Reference(folder, batch)
    kept: dict[str, Any] = {}

    def prepared(image: Path) -> Any:
        """What is kept of the image from its first question on."""
        if keep == "nothing":
            return image
        decoded = decode(image)
        return decoded if keep == "decoded" else reference.levels(decoded)

    def ask(image: Path | None, question: str, max_tokens: int) -> dict[str, Any]:
        if image is not None:
            kept.clear()
        start = time.perf_counter()
        reading = 0.0
        if image is not None:
            kept["image"] = prepared(image)
            reading = time.perf_counter() - start
        answer = reference.ask(kept["image"], question, max_tokens=max_tokens)
        seconds = dict(answer.seconds)
        seconds["read"] += reading
        return {
            "seconds": {**seconds, "total": time.perf_counter() - start},
            "ids": answer.token_ids,
            "text": answer.text,
            "tiles": answer.tiles_encoded,
            "sent": answer.sent,
        }

    return ask


def our_side(bundle: Path, policy: str, threads: int) -> Ask:
    """The runtime under one of its policies, `reference` with the reference's resampling."""
    import lrs_edge

    engine = lrs_edge.load(bundle, provider="cpu", threads=threads)
    scenes: list[lrs_edge.Scene] = []
    options: dict[str, Any] = {"policy": policy}
    if policy == "reference":
        options["resampling"] = "reference"

    def ask(image: Path | None, question: str, max_tokens: int) -> dict[str, Any]:
        while image is not None and scenes:
            scenes.pop().close()
        start = time.perf_counter()
        if image is not None:
            scenes.append(engine.open(image))
        opening = time.perf_counter() - start
        answer = scenes[-1].ask(question, max_tokens=max_tokens, **options)
        timings = answer.timings
        return {
            "seconds": {
                "read": opening + timings.read,
                "encode": timings.encode,
                "score": timings.score,
                "prefill": timings.prefill,
                "decode": timings.decode,
                "total": time.perf_counter() - start,
            },
            "ids": list(answer.token_ids),
            "text": answer.text,
            "tiles": 1
            + sum(level.tiles_encoded + level.tiles_from_cache for level in answer.levels),
            "sent": answer.tokens.sent,
        }

    return ask


def main() -> None:
    """Load, then answer until the input ends."""
    parser = parser_for(__doc__)
    parser.add_argument("side", choices=["torch", "full", "reference"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--keep", choices=KEEPS, default=KEEPS[0])
    parser.add_argument("--batch", type=int, help="default: all tiles")
    options = parser.parse_args()
    if options.side == "torch":
        ask = torch_side(options.model, options.keep, options.batch, options.threads)
    else:
        ask = our_side(options.model, options.side, options.threads)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        image = None if wanted["image"] is None else Path(wanted["image"])
        figures = ask(image, wanted["question"], wanted["max_tokens"])
        print(json.dumps({**figures, "peak_mib": peak_mib()}), flush=True)


if __name__ == "__main__":
    main()
