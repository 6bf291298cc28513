"""Measure a checkpoint in torch: held-out scenes, mosaics, photographs, localisation, samples.

    python evaluate.py scenes [--split test|dev] [--limit N]   names 30 classes by generation
    python evaluate.py questions [--limit N]                   mosaics and photographs, by kind
    python evaluate.py localise [--limit N]                    RFM, LLM layers 1..3, against chance
    python evaluate.py samples [--limit N]                     questions and answers to read

Scenes are read from their files and encoded in float32 here (no cached features); the sequence is
the one that the runtime builds: global view, ":", the top 25 % of local tokens by RFM, newlines.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from checkpoint import load_checkpoint
from common import SCENE_QUESTION, SCENES, Paths
from features import Encoder, scene_pixels
from generate import Runner
from questions import Question, mosaic_questions, object_questions, scene_questions
from sequences import View, Writer, single_tile
from store import Store
from tokenizers import Tokenizer


def normalised(answer: str) -> str:
    """Lower case, no punctuation at the ends, no article."""
    text = " ".join(answer.lower().split()).strip(" .,!?\"'")
    for article in ("a ", "an ", "the "):
        text = text.removeprefix(article)
    return text


def scenes(runner: Runner, paths: Paths, store: Store, split: str, limit: int | None) -> None:
    """Share of scenes named exactly."""
    encoder = Encoder(paths.features / "encoder.onnx", torch.get_num_threads())
    indices = list(store.test if split == "test" else store.dev)
    random.Random(0).shuffle(indices)
    right, seen = Counter(), Counter()
    wrong: Counter[tuple[str, str]] = Counter()
    for done, index in enumerate(indices[:limit], 1):
        scene = store.scenes[index]
        pixels = scene_pixels(paths.data / "aid150_rsicd" / scene["file"], 0, 0)
        view = single_tile(encoder(pixels))
        said, name = normalised(runner.answer(view, SCENE_QUESTION, 12)), SCENES[scene["scene"]]
        seen[name] += 1
        right[name] += said == name
        if said != name:
            wrong[(name, said)] += 1
        if done % 250 == 0:
            print(f"{done}: {right.total() / done:.3f}", file=sys.stderr, flush=True)
    total = seen.total()
    print(f"question: {SCENE_QUESTION}")
    print(f"{split} scenes named exactly: {right.total()}/{total} = {right.total() / total:.4f}")
    print(
        "weakest:",
        ", ".join(
            f"{n} {right[n]}/{seen[n]}" for n in sorted(seen, key=lambda n: right[n] / seen[n])[:8]
        ),
    )
    print("most confused:", ", ".join(f"{a} -> {b} {n}" for (a, b), n in wrong.most_common(10)))
    spoken = {n for _, n in wrong} - set(SCENES.values())
    print("answers that are no class name:", sum(n for (_, b), n in wrong.items() if b in spoken))


def asked(store: Store, kinds: set[str], limit: int) -> list[tuple[dict, View, list[Question]]]:
    """Development pictures with their questions, the same at every call."""
    draw = random.Random(5)
    found = []
    chosen = [p for p in store.pictures if p["split"] == "dev" and p["kind"] in kinds]
    draw.shuffle(chosen)
    for picture in chosen[:limit]:
        photo = picture["kind"] in ("simd", "open")
        questions = (object_questions if photo else mosaic_questions)(picture, draw, 5)
        found.append((picture, store.picture_view(picture), questions))
    return found


def questions(runner: Runner, store: Store, limit: int) -> None:
    """Exact answers on development pictures by kind of question."""
    for name, kinds in (("mosaics", {"mosaic", "free"}), ("photographs", {"simd", "open"})):
        right, seen = Counter(), Counter()
        yes: dict[str, int] = defaultdict(int)
        for _, view, some in asked(store, kinds, limit):
            for question in some:
                said = normalised(runner.answer(view, question.text))
                seen[question.kind] += 1
                right[question.kind] += said == question.answer
                if question.kind == "presence":
                    yes[f"{question.answer} {said == question.answer}"] += 1
        print(name, {k: f"{right[k]}/{n} = {right[k] / n:.2f}" for k, n in seen.items()}, dict(yes))


def localise(runner: Runner, store: Store, limit: int) -> None:
    """Attention mass on the evidence and recall of the top quarter, for each scoring layer."""
    print(
        "| pictures | layer | questions | evidence share | mass | mass / chance | top-25 % recall "
        "(chance 0.25) | best token in evidence |"
    )
    print("|---|---|---|---|---|---|---|---|")
    groups = {
        "mosaic": {"mosaic"},
        "free mosaic": {"free"},
        "SIMD val": {"simd"},
        "open_objects test": {"open"},
    }
    for name, kinds in groups.items():
        cases = []
        for _, view, some in asked(store, kinds, limit):
            for question in some:
                shown = view.evidence(question.evidence) if question.evidence else None
                if shown is not None and shown.mean() < 0.6:
                    cases.append((view, question.text, shown))
        for layer in (None, 1, 2, 3):
            who = f"LLM {layer}" if layer else "RFM"
            rows = []
            for view, text, shown in cases:
                scores = runner.scores(view, text, layer)
                kept = runner.keep(scores)[:, :-1]
                local = scores[:, :-1] / scores[:, :-1].sum()
                best = np.unravel_index(local.argmax(), local.shape)
                rows.append((shown.mean(), local[shown].sum(), kept[shown].mean(), shown[best]))
            share, mass, recall, hit = np.array(rows, float).mean(0)
            print(
                f"| {name} | {who} | {len(rows)} | {share:.3f} | {mass:.3f} | "
                f"{mass / share:.2f} | {recall:.3f} | {hit:.3f} |",
                flush=True,
            )


def samples(runner: Runner, store: Store, count: int) -> None:
    """Questions and answers on held-out pictures, to read."""
    draw = random.Random(11)
    for index in draw.sample(store.test, count // 2):
        scene = store.scenes[index]
        view = store.scene_view(index)
        some = scene_questions(scene["scene"], scene["captions"], draw, 6)
        question = draw.choice(some)
        print(
            f"{scene['file']} | Q: {question.text} | A: {runner.answer(view, question.text)} | "
            f"expected: {question.answer}"
        )
    for picture, view, some in asked(store, {"mosaic", "free", "simd", "open"}, 2 * count):
        if not some or count <= 0:
            continue
        count -= 2
        question = draw.choice(some)
        name = picture["source"] or "/".join(r["label"] for r in picture["regions"])
        print(
            f"{name} | Q: {question.text} | A: {runner.answer(view, question.text)} | "
            f"expected: {question.answer}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["scenes", "questions", "localise", "samples"])
    parser.add_argument("--checkpoint", type=Path, help="default: <work>/checkpoint")
    parser.add_argument("--split", choices=["test", "dev"], default="dev")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    paths = Paths()
    folder = options.checkpoint or paths.checkpoint
    model, config, rfm = load_checkpoint(folder)
    writer = Writer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    runner = Runner(model, writer, rfm)
    store = Store(paths)
    print(json.dumps({"checkpoint": str(folder), **config["training"]}))
    if options.what == "scenes":
        scenes(runner, paths, store, options.split, options.limit)
    elif options.what == "questions":
        questions(runner, store, options.limit or 60)
    elif options.what == "localise":
        localise(runner, store, options.limit or 30)
    else:
        samples(runner, store, options.limit or 20)


if __name__ == "__main__":
    main()
