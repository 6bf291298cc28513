"""Train the region focus module apart from the language model it starts as a copy of.

The copy's layers 0 .. N-1 and the scoring layer's input norm, q and k learn only to look at the
evidence; projector and embeddings stay as they are, and so do the language model's answers. State
goes to `<work>/rfm.pt`, and the released checkpoint is written again with it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from checkpoint import load_checkpoint, save_checkpoint
from common import Paths
from model import LanguageModel
from sequences import Batch, Writer, collate
from store import Store
from tokenizers import Tokenizer
from torch import Tensor
from train import RFM_LAYERS, embed, localisation_loss

MIX = {"search": 0.7, "photo": 0.3}
PARTS = (1.0, 0.4) + (0.3,) * RFM_LAYERS
"""Weights of local and global attention at the scoring layer, and of words in lower layers."""


def scoring_part(llm: LanguageModel, layers: int) -> LanguageModel:
    """A copy of the layers that the RFM has; embeddings are shared, gradients go where needed."""
    rfm = copy.deepcopy(llm)
    rfm.layers = rfm.layers[: layers + 1]
    rfm.requires_grad_(False)
    rfm.layers[:layers].requires_grad_(True)
    last = rfm.layers[layers]
    for module in (last.input_layernorm, last.self_attn.q_proj, last.self_attn.k_proj):
        module.requires_grad_(True)
    return rfm


class RfmTrainer:
    """One run of the RFM's training and its state on disk."""

    def __init__(self, paths: Paths, seconds: float, rate: float) -> None:
        self.paths, self.seconds, self.rate = paths, seconds, rate
        self.store = Store(paths)
        tokenizer = Tokenizer.from_file(str(paths.base / "tokenizer.json"))
        self.writer = Writer(tokenizer)
        self.model, described, _ = load_checkpoint(paths.checkpoint)
        self.notes = described["training"]
        self.rfm = scoring_part(self.model.llm, RFM_LAYERS)
        parameters = [p for p in self.rfm.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.02)
        self.step, self.spent = 0, 0.0
        self.file = paths.work / "rfm.pt"
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            if saved["notes"] == {k: self.notes[k] for k in saved["notes"]}:
                self.rfm.load_state_dict(saved["rfm"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.step, self.spent = saved["step"], saved["spent"]

    def save(self) -> None:
        """Training state, and the checkpoint with the RFM as it is now."""
        notes = {k: self.notes[k] for k in ("step", "seconds")}
        part = self.file.with_suffix(".part")
        state = {"rfm": self.rfm.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "step": self.step, "spent": self.spent, "notes": notes}, part)
        os.replace(part, self.file)
        notes |= {"rfm_step": self.step, "rfm_seconds": round(self.spent)}
        save_checkpoint(self.model, self.paths, RFM_LAYERS, notes, rfm=self.rfm)

    def draw(self, step: int) -> tuple[str, Batch]:
        """The batch of one step."""
        draw = random.Random(f"rfm/{step}")
        while True:
            kind = draw.choices(list(MIX), list(MIX.values()))[0]
            batch = collate(self.store.draw_batch(kind, self.writer, draw))
            if len(batch.query_batch):
                return kind, batch

    def loss(self, batch: Batch) -> Tensor:
        """Local, global and word losses, unweighted."""
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                inputs = embed(self.model, batch)
            states = self.rfm.states(inputs, batch.positions, batch.mask, layers=RFM_LAYERS)
            return localisation_loss(self.rfm, batch, states)

    def run(self, save_every: float = 150.0) -> None:
        """Train until the time is spent."""
        mean: dict[str, float] = {}
        saved_at = self.spent
        weights = torch.tensor(PARTS)
        trained = [p for p in self.rfm.parameters() if p.requires_grad]
        with (
            ThreadPoolExecutor(1) as pool,
            open(self.paths.work / "rfm.jsonl", "a", encoding="utf-8") as log,
        ):
            ahead = pool.submit(self.draw, self.step)
            while self.spent < self.seconds:
                begun = time.time()
                kind, batch = ahead.result()
                ahead = pool.submit(self.draw, self.step + 1)
                cosine = 0.5 * (1 + math.cos(math.pi * self.spent / self.seconds))
                for group in self.optimizer.param_groups:
                    group["lr"] = (
                        self.rate * min(1.0, (self.step + 1) / 20) * (0.02 + 0.98 * cosine)
                    )
                parts = self.loss(batch)
                self.optimizer.zero_grad()
                (parts * weights).sum().backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                self.optimizer.step()
                self.step += 1
                self.spent += time.time() - begun
                for name, value in zip(("local", "global", "word0", "word1"), parts, strict=False):
                    key = f"{kind}_{name}"
                    mean[key] = 0.93 * mean.get(key, value.item()) + 0.07 * value.item()
                if self.step % 20 == 0:
                    line = {"step": self.step, "spent": round(self.spent)}
                    line |= {k: round(v, 3) for k, v in sorted(mean.items())}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if self.spent - saved_at > save_every:
                    self.save()
                    saved_at = self.spent
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    RfmTrainer(Paths(), options.minutes * 60, options.rate).run()


if __name__ == "__main__":
    main()
