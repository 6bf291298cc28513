"""One question through the reference, from the file to the answer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from benchmarks.reference_torch.clip import ClipOnDevice
from benchmarks.reference_torch.decoder import Cache, Decoder
from benchmarks.reference_torch.image import Levels, Resized, decode, open_levels
from benchmarks.reference_torch.tokens import (
    Local,
    chosen_tiles,
    head_means,
    kept,
    local_tokens,
    with_positions,
)
from benchmarks.reference_torch.weights import load_weights
from lrs_edge.bundle.layout import Separator
from lrs_edge.language.prompt import Prompt
from lrs_edge_export.torch_model.vision import vision_tokens

#: Share of the local tokens kept in both selections (docs/algorithm.md).
KEEP_RATIO = 0.25


@dataclass(frozen=True)
class ReferenceAnswer:
    """What one question gave.

    Attributes:
        token_ids: Generated tokens, the stop token not included.
        text: The same as text.
        tiles: Row and column of the tiles looked at on the next level.
        kept: Places of the local tokens given to the language model, in the next level's sequence.
        scores: Scores of all local tokens of the base and of the next level.
        sent: Vision tokens given to the language model, the separator included.
        tiles_encoded: Tiles that went through the vision tower, the global view included.
        seconds: By stage: read (decode, resample), encode, score, prefill, decode.
    """

    token_ids: list[int]
    text: str
    tiles: list[tuple[int, int]]
    kept: list[int]
    scores: tuple[Tensor, Tensor]
    sent: int
    tiles_encoded: int
    seconds: dict[str, float]


class _Stopwatch:
    """Seconds by stage; what a GPU still has to do belongs to the stage that asked for it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device == "cuda":
                torch.cuda.synchronize()
            self.seconds[name] += time.perf_counter() - start


class Reference:
    """The loaded model.

    Args:
        folder: Checkpoint of any family that `lrs-edge export` reads.
        batch: Tiles that go through the vision tower at once; None for all, as in the authors'
            code. On a CPU convolutions over a large batch leave the caches, and one is quicker.
        device: `cuda` keeps weights in float16 there and computes under autocast.

    Raises:
        ExportError: The checkpoint is not usable.
    """

    def __init__(self, folder: Path, batch: int | None = None, device: str = "cpu") -> None:
        self._batch = batch
        self._device = device
        self._weights = load_weights(folder, device)
        self._on_device: ClipOnDevice | None = None
        if device != "cpu":
            self._on_device = ClipOnDevice(self._weights.vision, device, torch.float16)
        self._rfm = Decoder(self._weights.rfm)
        self._llm = Decoder(self._weights.llm)
        model = self._weights.model
        self._tokenizer = Tokenizer.from_str(model.tokenizer_json)
        self._texts = Prompt(model.tokenizer_json, model.prompt, model.vocabulary)

    def levels(self, image: Image.Image) -> Levels:
        """The image preprocessed. Raises ValueError where the authors' code fails."""
        vision = self._weights.vision
        return open_levels(
            image,
            tile=vision.tile,
            base_side=self._weights.model.base_side,
            mean=vision.mean,
            std=vision.std,
            device=self._device,
        )

    def ask(
        self,
        image: Path | Image.Image | Levels,
        question: str,
        *,
        max_tokens: int = 64,
        end_str: str = "",
    ) -> ReferenceAnswer:
        """Answer one question; nothing of earlier ones is used.

        Args:
            image: The file, or what is left of the work on it: decoded, or preprocessed.
            question: What to ask.
            max_tokens: Most tokens generated.
            end_str: Instruction on the line after the question.

        Raises:
            ValueError: The authors' code fails on an image of this shape.
        """
        watch = _Stopwatch(self._device)
        with self._computing():
            with watch.stage("read"):
                if isinstance(image, Path):
                    image = decode(image)
                levels = self.levels(image) if isinstance(image, Image.Image) else image
            before, after = self._prompt(question, end_str)
            return self._answer(levels, before, after, max_tokens, watch)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Tensors are made on the device, and products on a GPU computed in float16."""
        half = torch.autocast("cuda", torch.float16, enabled=self._device == "cuda")
        with torch.inference_mode(), torch.device(self._device), half:
            yield

    def _answer(
        self, levels: Levels, before: Tensor, after: Tensor, max_tokens: int, watch: _Stopwatch
    ) -> ReferenceAnswer:
        weights, base = self._weights, levels.levels[0]
        finer = levels.levels[min(1, len(levels.levels) - 1)]
        with watch.stage("encode"):
            everywhere = [(row, col) for row in range(base.rows) for col in range(base.cols)]
            tokens = self._encoded(torch.cat((levels.view.tiles, base.tiles)))
            view = self._placed(tokens[:1], levels.view, [(0, 0)])[0].flatten(0, 1)
            features = self._placed(self._pooled(tokens[1:]), base, everywhere)
            first = local_tokens(
                base, everywhere, features, weights.newline, (levels.height, levels.width)
            )
        parts = weights.model.prompt.parts
        (separator_ids,) = (part.ids for part in parts if isinstance(part, Separator))
        separator = weights.embed_tokens[torch.tensor(separator_ids)]
        prefix = torch.cat((before, view, separator))
        with watch.stage("score"):
            first_scores = self._scores(prefix, first, after)
            tiles = chosen_tiles(kept(first_scores, first, KEEP_RATIO), first, finer)
        with watch.stage("encode"):
            places = torch.tensor([row * finer.cols + col for row, col in tiles])
            features = self._pooled(self._encoded(finer.tiles[places]))
            features = self._placed(features, finer, tiles)
            second = local_tokens(
                finer, tiles, features, weights.newline, (finer.height, finer.width)
            )
        with watch.stage("score"):
            second_scores = self._scores(prefix, second, after)
            chosen = kept(second_scores, second, KEEP_RATIO)
        whole = torch.cat((prefix, second.embeds[chosen], after))
        whole = whole[: weights.model.limits.max_length]
        ids = self._generated(whole, max_tokens, watch)
        sent = min(len(prefix) + len(chosen), len(whole)) - len(before)
        return ReferenceAnswer(
            token_ids=ids,
            text=self._tokenizer.decode(ids, skip_special_tokens=True).strip(),
            tiles=tiles,
            kept=chosen.tolist(),
            scores=(first_scores, second_scores),
            sent=sent,
            tiles_encoded=1 + len(everywhere) + len(tiles),
            seconds=dict(watch.seconds),
        )

    def _prompt(self, question: str, end_str: str) -> tuple[Tensor, Tensor]:
        """Embeddings of the text before and after the image."""
        ids = self._texts.tokens(question, end_str)
        table = self._weights.embed_tokens
        before, after = torch.from_numpy(ids.before), torch.from_numpy(ids.after)
        return table[before.to(self._device)], table[after.to(self._device)]

    def _encoded(self, tiles: Tensor) -> Tensor:
        """Tokens [N, G, G, D] of tiles [N, 3, S, S]."""
        stage = self._weights.vision
        parts = torch.split(tiles, self._batch or len(tiles))
        encode = self._on_device or (lambda part: vision_tokens(stage, part))
        tokens = torch.cat([encode(part) for part in parts])
        side = stage.grid
        return tokens.reshape(len(tiles), side, side, -1)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Tokens [N, P, P, D] of local tiles."""
        stage = self._weights.vision
        if stage.local_pool == 1:
            return tokens
        side = -(-stage.grid // stage.local_pool)
        planes = tokens.permute(0, 3, 1, 2)
        halved = F.interpolate(planes, (side, side), mode="bilinear", align_corners=False)
        return halved.permute(0, 2, 3, 1)

    def _placed(self, tokens: Tensor, level: Resized, tiles: list[tuple[int, int]]) -> Tensor:
        tables = self._weights.tables
        return tokens if tables is None else with_positions(tokens, tables, level, tiles)

    def _scores(self, prefix: Tensor, local: Local, after: Tensor) -> Tensor:
        """Scores [n] of local tokens, computed over the whole dense sequence."""
        start, count = len(prefix), len(local.embeds)
        hidden = None if local.valid.all() else ~local.valid
        mask = None
        if hidden is not None:
            length = start + count + len(after)
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            mask[:, start : start + count] &= local.valid
        states = self._rfm.states(torch.cat((prefix, local.embeds, after)), mask=mask)
        return head_means(self._rfm.scores(states)[:, start : start + count], hidden)

    def _generated(self, embeds: Tensor, max_tokens: int, watch: _Stopwatch) -> list[int]:
        """Greedy decoding after a prompt [T, D]."""
        weights, cache, ids = self._weights, Cache(), list[int]()
        with watch.stage("prefill"):
            states = self._llm.states(embeds, cache=cache)
            logits = self._llm.last_logits(states, weights.lm_head)
        with watch.stage("decode"):
            while True:
                token = int(self._penalised(logits, ids).argmax())
                if token in weights.model.prompt.stop_ids:
                    return ids
                ids.append(token)
                if len(ids) >= max_tokens:
                    return ids
                new = weights.embed_tokens[token][None]
                states = self._llm.states(new, len(embeds) + len(ids) - 1, cache=cache)
                logits = self._llm.last_logits(states, weights.lm_head)

    def _penalised(self, logits: Tensor, ids: list[int]) -> Tensor:
        """The repetition penalty, as transformers applies it to greedy decoding too."""
        rule = self._weights.model.repetition
        if rule.penalty == 1.0:
            return logits
        seen = torch.tensor(sorted({*rule.penalised_ids, *ids}), dtype=torch.long)
        values, logits = logits[seen], logits.clone()
        logits[seen] = torch.where(values > 0, values / rule.penalty, values * rule.penalty)
        return logits
