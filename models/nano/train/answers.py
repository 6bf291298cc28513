"""Train on only what comes after the looking: how the language model reads what it looks at.

Layers 0 .. N-1 and layer N's input norm, queries and keys stay as they are, and so do projector,
positions and embeddings: whatever the region focus module was distilled from is unchanged, and so
is the module. What is left learns the questions that need to read a place off the attended tokens:
where something is, what lies there, what lies beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoint import load_checkpoint, save_checkpoint
from common import Paths
from model import Nano
from sequences import Batch, Writer, collate
from store import Store
from tokenizers import Tokenizer
from torch import Tensor
from train import EARLY, RFM_LAYERS, answer_loss, embed, place_words, start_copying

MIX = {"large": 0.66, "scene": 0.17, "photo": 0.17}


def reading_part(model: Nano) -> list[Tensor]:
    """The parameters after the looking; all others no longer take gradients."""
    model.requires_grad_(False)
    layer = model.llm.layers[RFM_LAYERS]
    parts = [layer.self_attn.v_proj, layer.self_attn.o_proj, layer.post_attention_layernorm]
    parts += [layer.mlp, model.llm.layers[RFM_LAYERS + 1 :], model.llm.norm]
    found = []
    for part in parts:
        part.requires_grad_(True)
        found += list(part.parameters())
    return found


def reading_loss(model: Nano, batch: Batch) -> tuple[Tensor, Tensor]:
    """What is minimised, and the answer loss alone."""
    llm = model.llm
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            x = llm.states(embed(model, batch), batch.positions, batch.mask, layers=RFM_LAYERS)[-1]
        states = llm.states(x, batch.positions, batch.mask, first=RFM_LAYERS)[1:]
        losses = [answer_loss(model, batch, state) for state in states]
    return losses[-1] + EARLY * torch.stack(losses[:-1]).sum(), losses[-1]


class ReadingTrainer:
    """One run and its state on disk."""

    def __init__(self, paths: Paths, start: Path, seconds: float, rate: float) -> None:
        self.paths, self.seconds, self.rate = paths, seconds, rate
        self.store = Store(paths)
        tokenizer = Tokenizer.from_file(str(paths.base / "tokenizer.json"))
        self.writer = Writer(tokenizer)
        self.model, described, self.rfm = load_checkpoint(start)
        self.notes = described["training"]
        large = collate(self.store.draw_batch("large", self.writer, random.Random(0)))
        start_copying(self.model, place_words(self.model, tokenizer), large)
        self.trained = reading_part(self.model)
        decayed = [p for p in self.trained if p.dim() > 1]
        plain = [p for p in self.trained if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.03}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98))
        self.step, self.spent = 0, 0.0
        self.state = paths.work / "answers.pt"
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.spent = saved["step"], saved["spent"]

    def save(self) -> None:
        """State, and the checkpoint with the same RFM."""
        part = self.state.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "spent": self.spent}, part)
        os.replace(part, self.state)
        notes = {**self.notes, "answers_step": self.step, "answers_seconds": round(self.spent)}
        save_checkpoint(self.model, self.paths, RFM_LAYERS, notes, self.rfm, "answers")

    def draw(self, step: int) -> tuple[str, Batch]:
        """The batch of one step."""
        draw = random.Random(f"answers/{step}")
        kind = draw.choices(list(MIX), list(MIX.values()))[0]
        return kind, collate(self.store.draw_batch(kind, self.writer, draw))

    def run(self, save_every: float = 120.0) -> None:
        """Train until the time is spent."""
        mean: dict[str, float] = {}
        saved_at = self.spent
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.draw, self.step)
            while self.spent < self.seconds:
                begun = time.time()
                kind, batch = ahead.result()
                ahead = pool.submit(self.draw, self.step + 1)
                cosine = 0.5 * (1 + math.cos(math.pi * self.spent / self.seconds))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate * min(1.0, (self.step + 1) / 20) * (0.02 + cosine)
                loss, answer = reading_loss(self.model, batch)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 2.0)
                self.optimizer.step()
                self.step += 1
                self.spent += time.time() - begun
                mean[kind] = 0.95 * mean.get(kind, answer.item()) + 0.05 * answer.item()
                if self.step % 20 == 0:
                    line = {"step": self.step, "spent": round(self.spent)}
                    print(json.dumps(line | {k: round(v, 3) for k, v in mean.items()}), flush=True)
                if self.spent - saved_at > save_every:
                    self.save()
                    saved_at = self.spent
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, help="default: <work>/distilled")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=6e-4)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    paths = Paths()
    start = options.start or paths.work / "distilled"
    ReadingTrainer(paths, start, options.minutes * 60, options.rate).run()


if __name__ == "__main__":
    main()
