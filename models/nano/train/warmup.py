"""Warm start of the projector, without the language model.

Every image's projected tokens, normalised and averaged, must predict the words of its caption and
of its class name through the (frozen) token embeddings. Afterwards vision tokens lie where the
language model expects words, and training converges much sooner.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
from common import SCENES, Paths
from loop import save_atomically
from model import Nano
from store import Store
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

STOP_WORDS = set(
    "a an the is are of in with and on many some there to by this near it".split()  # noqa: SIM905
)


def decode(features: Tensor) -> Tensor:
    """common.compress backwards."""
    return (features.float() / 255.0).square() * 6.0


def word_targets(
    store: Store, tokenizer: Tokenizer, indices: list[int], draw: random.Random
) -> Tensor:
    """For each image a distribution over tokens: half the class name, half one caption's words."""
    size = tokenizer.get_vocab_size()
    found = np.zeros((len(indices), size), np.float32)
    for row, index in enumerate(indices):
        scene = store.scenes[index]
        name = tokenizer.encode(" " + SCENES[scene["scene"]]).ids
        found[row, name] += 0.5 / len(name)
        if scene["captions"]:
            caption = draw.choice(scene["captions"])
            words = [w for w in caption.split() if w not in STOP_WORDS]
            ids = sorted({i for w in words for i in tokenizer.encode(" " + w).ids})
            if ids:
                found[row, ids] += 0.5 / len(ids)
    return torch.from_numpy(found / found.sum(1, keepdims=True))


def warm_up(model: Nano, store: Store, tokenizer: Tokenizer, steps: int, batch: int = 48) -> None:
    """Train the projector in place for so many steps."""
    draw = random.Random(1)
    table = model.llm.embed_tokens.weight.detach()
    centred = table - table.mean(0)
    directions = functional.normalize(centred, dim=1)
    scale = torch.nn.Parameter(torch.tensor(3.0))
    parameters = [*model.projector.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    begun, mean_loss = time.time(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(
                (step + 1) / 30, 0.5 + 0.5 * np.cos(np.pi * step / steps) + 0.01
            )
        indices = draw.sample(store.train, batch)
        views = [store.variants[draw.randrange(len(store.variants))][i] for i in indices]
        features = decode(torch.from_numpy(np.stack(views)))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.projector(features)
        tokens = tokens.float()
        unit = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)
        pooled = functional.normalize(unit.mean(1), dim=1)
        # Single tokens should say something too: a random one from each image.
        at = torch.randint(0, unit.shape[1], (len(indices),))
        single = functional.normalize(unit[torch.arange(len(indices)), at], dim=1)
        targets = word_targets(store, tokenizer, indices, draw)
        loss = torch.zeros(())
        for vector, share in ((pooled, 0.75), (single, 0.25)):
            logits = scale.exp() * vector @ directions.T
            loss = loss - share * (targets * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.item() if step == 0 else 0.97 * mean_loss + 0.03 * loss.item()
        if (step + 1) % 25 == 0:
            rate = (step + 1) / (time.time() - begun)
            print(
                f"warm-up {step + 1}/{steps}: loss {mean_loss:.3f}, {rate:.2f} steps/s", flush=True
            )
    rescale(model, table, tokens)


@torch.no_grad()
def rescale(model: Nano, table: Tensor, tokens: Tensor) -> None:
    """Give projected tokens the length of word embeddings (the language model's input scale)."""
    factor = table.square().mean().sqrt() / tokens.square().mean().sqrt()
    last = model.projector.mlp_projector[2]
    last.weight *= factor
    last.bias *= factor
    model.image_newline.copy_(torch.randn_like(model.image_newline) * table.square().mean().sqrt())


def warmed_model(paths: Paths, model: Nano, store: Store, tokenizer: Tokenizer, steps: int) -> None:
    """Warm up, or load the projector that an earlier run left in `<work>/projector.pt`."""
    file = paths.work / "projector.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.projector.load_state_dict(state["projector"])
        model.image_newline.data.copy_(state["newline"])
        return
    warm_up(model, store, tokenizer, steps)
    save_atomically(
        file, {"projector": model.projector.state_dict(), "newline": model.image_newline.data}
    )
