"""Train projector and language model on the cached features; resumable, bounded in time.

The learning rate follows the share of the training time that is spent, so the run ends when it
should on any machine. State goes to `<work>/state.pt` every few minutes, a released checkpoint to
`<work>/checkpoint`, the log to `<work>/train.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint, start_model
from common import SCENES, Paths
from loop import save_atomically, slope
from model import LanguageModel, Nano
from sequences import Batch, Writer, collate
from store import Store
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from warmup import decode, warmed_model
from words import WORDS

from lrs_edge_export.torch_model.decoder import rope

MIX = {"scene": 0.08, "boxed": 0.46, "canvas": 0.16, "large": 0.16, "search": 0.14}
"""Share of the steps of each kind."""
WARM_STEPS = 400
EARLY = 0.25
"""Weight of the answers read from layers before the last."""
RFM_LAYERS = 2
AUXILIARY = 0.4
"""Weight of the localisation loss."""
SPOKEN = {**SCENES, "longvehicle": "long vehicle", "chartered": "plane", "trainer": "plane"}
"""How words are spelled where not as in `words.WORDS`."""


def embed(model: Nano, batch: Batch) -> Tensor:
    """Input embeddings: words, projected vision tokens, newlines."""
    words = model.llm.embed_tokens(batch.ids)
    vision = model.projector(decode(batch.features)) + model.position(batch.centres)
    vision = vision.to(words.dtype)
    flat = words.reshape(-1, words.shape[-1])
    flat = flat.index_put((batch.vision_places,), vision[batch.vision_rows])
    if len(batch.newline_places):
        newline = model.image_newline.expand(len(batch.newline_places), -1)
        flat = flat.index_put((batch.newline_places,), newline)
    return flat.view_as(words)


def attention_loss(
    llm: LanguageModel, batch: Batch, state: Tensor, layer: int, parts: tuple[int, ...]
) -> list[Tensor]:
    """Minus log of one layer's head-mean attention mass on the evidence, for each part.

    The queries are last prompt tokens. Parts are those of `Batch.query_seen`: local tokens, global
    tokens, and everything (where the evidence is the words that name what is looked for).
    """
    b = batch.query_batch
    turns = rope(llm.config.decoder, batch.positions)
    q, k = llm.layers[layer].queries_keys(state, turns)
    logits = torch.einsum("nhd,nhtd->nht", q[b, :, batch.query_places].float(), k[b].float())
    logits = logits / llm.config.head_dim**0.5
    found = []
    for index in parts:
        seen, shown = batch.query_seen[index], batch.query_evidence[index]
        useful = (shown.sum(-1) > 0) & (shown.sum(-1) < 0.9 * seen.sum(-1))
        if useful.any():
            masked = logits[useful].masked_fill(~seen[useful][:, None], float("-inf"))
            share, wanted = masked.softmax(-1).mean(1), shown[useful]
            mass = (share * wanted).sum(-1)
            # Words need only part of the heads: nothing is gained above a mass of 0.4.
            most = {2: 0.4, 3: 0.5}.get(index, 1.0)
            loss = -(mass.clamp(max=most) / most + 1e-4).log()
            if index == 0:
                # Every token of the evidence counts alike: what the best one holds finds one box.
                count = wanted.sum(-1)
                even = -((share * count[:, None] + 1e-3).log() * wanted).sum(-1) / count
                loss = 0.5 * loss + 0.5 * even
            found.append(loss.mean())
        else:
            found.append(logits.new_zeros(()))
    return found


def localisation_loss(
    llm: LanguageModel, batch: Batch, states: list[Tensor], layer: int = RFM_LAYERS
) -> Tensor:
    """Local and global attention at the scoring layer, and attention to the words before it.

    Only the local tokens are scored at run time. The global view teaches the same queries and keys
    for less, because every sequence has it; and the last token can only look for what it has
    gathered from the question's words in the layers before.
    """
    found = attention_loss(llm, batch, states[layer], layer, (0, 1))
    for lower in range(layer):
        found += attention_loss(llm, batch, states[lower], lower, (2,))
    # The layer after it looks at what the detector's words say.
    found += attention_loss(llm, batch, states[layer + 1], layer + 1, (3,))
    return torch.stack(found)


def losses(model: Nano, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is minimised for the answers, the answer loss, and localisation where it is known.

    The layers after the one that looks must each make the answer readable: what the attended
    tokens say, their place in the image among it, would otherwise take long to get through.
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = model.llm.states(embed(model, batch), batch.positions, batch.mask)
        answer = [answer_loss(model, batch, state) for state in states[RFM_LAYERS + 1 :]]
        place = None
        if len(batch.query_batch):
            place = localisation_loss(model.llm, batch, states)
    return answer[-1] + EARLY * torch.stack(answer[:-1]).sum(), answer[-1], place


def answer_loss(model: Nano, batch: Batch, state: Tensor) -> Tensor:
    """Cross-entropy of the answers read from one layer's output."""
    hidden = model.llm.norm(state)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.label_places]
    logits = model.llm.logits(hidden).float()
    each = functional.cross_entropy(logits, batch.labels, reduction="none")
    return (each * batch.weights).sum() / batch.weights.sum()


def parameter_groups(model: Nano, rate: float) -> list[dict[str, Any]]:
    """AdamW groups: the projector learns faster, vectors and embeddings do not decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.5 if name.startswith(("projector", "position", "image_newline")) else 1.0
        if "embed_tokens" in name:
            factor = 0.3
        decay = 0.0 if parameter.dim() < 2 or "embed_tokens" in name or "position" in name else 0.05
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": p, "lr": rate * f, "base": rate * f, "weight_decay": d}
        for (f, d), p in groups.items()
    ]


def continued(folder: Path, tokenizer: Tokenizer) -> Nano:
    """An earlier checkpoint's model; without a neck, its words start as their embeddings."""
    model, _ = load_checkpoint(folder)
    if not bool(model.projector.neck.weight.any()):
        table = model.llm.embed_tokens.weight
        spoken = [SPOKEN.get(word, word) for word in WORDS]
        rows = [table[tokenizer.encode(f" {text}").ids].mean(0) for text in spoken]
        model.projector.start_from_words(torch.stack(rows).detach())
    return model


def place_words(model: Nano, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Embeddings of the words for the image's edges, as they stand first and later in an answer."""
    found = {}
    for word in ("top", "bottom", "left", "right"):
        ids = [tokenizer.encode(text).ids for text in (word, f" {word}")]
        rows = torch.tensor([part[0] for part in ids])
        found[word] = model.llm.embed_tokens.weight[rows].mean(0).detach()
    return found


@torch.no_grad()
def start_copying(model: Nano, words: dict[str, Tensor], batch: Batch) -> None:
    """Let the layer that looks pass on where the tokens that it looks at lie.

    One channel each for up-down and left-right in the values of every key-value head of layer
    `RFM_LAYERS` reads the direction from one edge's word to the other's, and its query heads write
    it to the residual stream again. Only a start: training goes on from there.
    """
    part = model.llm.layers[RFM_LAYERS]
    values, out = part.self_attn.v_proj.weight, part.self_attn.o_proj.weight
    width = model.llm.config.head_dim
    sharing = part.config.heads // part.config.kv_heads
    states = model.llm.states(embed(model, batch), batch.positions, batch.mask)
    at = (batch.query_batch, batch.query_places)
    residual = states[RFM_LAYERS + 1][at].norm(dim=-1).mean()
    local = states[RFM_LAYERS].reshape(-1, values.shape[1])[batch.vision_places]
    scale = part.input_layernorm.weight
    for group in range(part.config.kv_heads):
        columns = [(group * sharing + head) * width for head in range(sharing)]
        here = slice(group * width, (group + 1) * width)
        load = values[here].norm(dim=1) * sum(out[:, c : c + width].norm(dim=0) for c in columns)
        edges = ("top", "bottom"), ("left", "right")
        for channel, pair in zip(load.argsort(), edges, strict=False):
            direction = functional.normalize(words[pair[0]] - words[pair[1]], dim=0)
            # Dimensions that the norm nearly switches off are left to it.
            row = direction / scale.clamp(min=0.3 * float(scale.median()))
            values[group * width + channel] = row / (part.input_layernorm(local) @ row).std()
            for column in columns:
                out[:, column + channel] = 0.25 * residual / part.config.heads * direction


class Trainer:
    """One training run and its state on disk."""

    def __init__(
        self,
        paths: Paths,
        seconds: float,
        rate: float,
        start: Path | None = None,
        name: str = "checkpoint",
    ) -> None:
        self.paths, self.seconds = paths, seconds
        self.store = Store(paths)
        tokenizer = Tokenizer.from_file(str(paths.base / "tokenizer.json"))
        self.writer = Writer(tokenizer)
        self.model = start_model(paths) if start is None else continued(start, tokenizer)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, rate), betas=(0.9, 0.98), eps=1e-8
        )
        self.step, self.spent = 0, 0.0
        self.name = name
        self.state = paths.work / f"{name}.pt"
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.spent = saved["step"], saved["spent"]
            print(f"resumed at step {self.step}, {self.spent:.0f} s spent", flush=True)
        elif start is None:
            warmed_model(paths, self.model, self.store, tokenizer, WARM_STEPS)
            words = place_words(self.model, tokenizer)
            self.model.position.start_from_words(words)
            large = self.store.draw_batch("large", self.writer, random.Random(0))
            start_copying(self.model, words, collate(large))

    def save(self) -> None:
        """Training state and released checkpoint, each replaced in one step."""
        save_atomically(
            self.state,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "spent": self.spent,
            },
        )
        notes = {"step": self.step, "seconds": round(self.spent)}
        save_checkpoint(self.model, self.paths, RFM_LAYERS, notes, name=self.name)

    def draw(self, step: int) -> tuple[str, Batch]:
        """The batch of one step; depends on the step only."""
        draw = random.Random(f"nano/{step}")
        kind = draw.choices(list(MIX), list(MIX.values()))[0]
        return kind, collate(self.store.draw_batch(kind, self.writer, draw))

    def run(self, save_every: float = 120.0, most_steps: int | None = None) -> None:
        """Train until the time is spent."""
        self.model.train()
        saved_at, mean = self.spent, {}
        with (
            ThreadPoolExecutor(1) as pool,
            open(self.paths.work / "train.jsonl", "a", encoding="utf-8") as log,
        ):
            ahead = pool.submit(self.draw, self.step)
            first = self.step
            while self.spent < self.seconds and (
                most_steps is None or self.step < first + most_steps
            ):
                begun = time.time()
                kind, batch = ahead.result()
                ahead = pool.submit(self.draw, self.step + 1)
                part = slope(self.step, 40, self.spent / self.seconds, 0.02)
                for group in self.optimizer.param_groups:
                    group["lr"] = group["base"] * part
                every, answer, place = losses(self.model, batch)
                loss = every if place is None else every + AUXILIARY * place.sum()
                self.optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.step += 1
                took = time.time() - begun
                self.spent += took
                self.note(mean, kind, answer.item(), [] if place is None else place.tolist(), took)
                if self.step % 25 == 0:
                    line = {
                        "step": self.step,
                        "spent": round(self.spent),
                        "norm": round(norm.item(), 2),
                    }
                    line |= {k: round(v, 3) for k, v in sorted(mean.items())}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if self.spent - saved_at > save_every:
                    self.save()
                    saved_at = self.spent
        self.save()

    @staticmethod
    def note(
        mean: dict[str, float], kind: str, answer: float, place: list[float], took: float
    ) -> None:
        """Moving averages for the log."""
        seen = {f"{kind}": answer, f"{kind}_seconds": took}
        seen |= {f"{kind}_place_{i}": value for i, value in enumerate(place)}
        for key, value in seen.items():
            mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=50.0, help="training time")
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from (default: SmolLM2)")
    parser.add_argument("--name", default="checkpoint", help="of the state and the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="stop after so many steps (for trying out)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    trainer = Trainer(Paths(), options.minutes * 60, options.rate, options.start, options.name)
    trainer.run(most_steps=options.steps)


if __name__ == "__main__":
    main()
