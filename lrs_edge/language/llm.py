"""The language model: prefill over a reused prefix, decode token by token. Knows no images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.answer import FinishReason
from lrs_edge.baselines.inside import PruningPlan
from lrs_edge.baselines.segments import SegmentCaches, SegmentedDecoder
from lrs_edge.bundle.bundle import Embeddings
from lrs_edge.engines.rows import Embeds
from lrs_edge.errors import BundleError
from lrs_edge.language.decoder import Decoder, OnPart
from lrs_edge.language.kv_cache import KVCache, TokenKind, Tokens, make_tokens
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sampling import Chooser

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One decoding step.

    Attributes:
        token: The generated id, or None at the end.
        text: Text that became complete with it.
        finish_reason: Set on the last step only.
    """

    token: int | None
    text: str
    finish_reason: FinishReason | None = None


class LanguageModel:
    """The LLM graph with its tokenizer, embeddings and stop rules.

    Args:
        decoder: The layers.
        prompt: The tokenizer.
        embeddings: Of tokens.
        stop_ids: Tokens that end an answer.
        stop_texts: Texts that end an answer.
        load_segments: Loads the layers cut into segments, called when that is first needed; None
            where the bundle has none.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt: Prompt,
        embeddings: Embeddings,
        *,
        stop_ids: tuple[int, ...],
        stop_texts: tuple[str, ...] = (),
        load_segments: Callable[[], SegmentedDecoder] | None = None,
    ) -> None:
        self._load_segments = load_segments
        self._loaded_segments: SegmentedDecoder | None = None
        self._decoder = decoder
        self._prompt = prompt
        self._embeddings = embeddings
        self._stop_ids = frozenset(stop_ids)
        self._stop_texts = stop_texts

    @property
    def graph_name(self) -> str:
        """File of the graph that runs whole prompts, under which its runs are counted."""
        return self._decoder.graph_name

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return self._decoder.new_cache()

    def prefill(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        prefix: int,
        on_part: OnPart | None = None,
    ) -> Logits:
        """Run the prompt; what the cache already holds of it is reused.

        Args:
            cache: Anything; afterwards it holds exactly these tokens.
            embeds: float32 [T, D], the whole sequence.
            tokens: Its labels [T].
            prefix: Tokens at the start that are the same for every question on the scene, less
                than T.
            on_part: As in `Decoder.prefill`.

        Returns:
            Logits float32 [V] of the last token.
        """
        ends = (prefix, len(tokens))
        return np.asarray(self._decoder.prefill(cache, embeds, tokens, ends, on_part=on_part)[0])

    def remembers(self, cache: KVCache, embeds: Embeds, tokens: Tokens, prefix: int) -> bool:
        """Whether `prefill` with the same arguments would have nothing to run."""
        return self._decoder.begins_with(cache, embeds, tokens, prefix)

    def fill_prefix(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        on_part: OnPart | None = None,
    ) -> None:
        """Make the cache begin with these tokens, which later prompts begin with too.

        Args:
            cache: Anything; what it holds after them stays where they were there already.
            embeds: float32 [n, D].
            tokens: Labels [n].
            on_part: As in `Decoder.prefill`.
        """
        if not self._decoder.begins_with(cache, embeds, tokens):
            self._decoder.prefill(cache, embeds, tokens, (len(tokens),), on_part=on_part)

    def try_step(self, cache: KVCache) -> None:
        """Run one token after the cached ones and forget it: only its time is of interest."""
        length = len(cache)
        embeds = self._embeddings.lookup(np.zeros(1, np.int64))
        self._decoder.forward(cache, embeds, make_tokens(cache.text_positions(1), TokenKind.ANSWER))
        cache.truncate(length)

    def prefill_pruned(
        self, embeds: Embeds, tokens: Tokens, plan: PruningPlan
    ) -> tuple[SegmentCaches, Logits]:
        """Run the whole prompt, dropping vision tokens between layers.

        Args:
            embeds: float32 [T, D], the whole sequence.
            tokens: Its labels [T].
            plan: Where, and how many.

        Returns:
            New caches, and logits float32 [V] of the last token.

        Raises:
            BundleError: The bundle has no segments.
        """
        caches, logits = self._segments().prefill(embeds, tokens, plan)
        return caches, np.asarray(logits[0])

    def _segments(self) -> SegmentedDecoder:
        if self._load_segments is None:
            raise BundleError(
                "this bundle's language model is one graph; export it with --attention-layers"
            )
        if self._loaded_segments is None:
            self._loaded_segments = self._load_segments()
        return self._loaded_segments

    def _forward(self, cache: KVCache | SegmentCaches, embeds: Embeds, tokens: Tokens) -> Logits:
        if isinstance(cache, SegmentCaches):
            return np.asarray(self._segments().forward(cache, embeds, tokens)[0])
        return np.asarray(self._decoder.forward(cache, embeds, tokens)[0])

    def generate(
        self,
        cache: KVCache | SegmentCaches,
        logits: Logits,
        sampler: Chooser,
        *,
        max_tokens: int,
        expired: Callable[[], bool],
        on_logits: Callable[[Logits], None] | None = None,
    ) -> Iterator[Step]:
        """Decode until a stop token or text, `max_tokens`, or the time limit.

        The cache then holds the generated tokens too, but for the last.

        Args:
            cache: Holds the prompt.
            logits: float32 [V] after the prompt.
            sampler: Chooses tokens.
            max_tokens: Most tokens generated.
            expired: True when the time is up; asked before every token.
            on_logits: Sees the logits of every step (for traces).

        Yields:
            Steps; the last one has a finish reason.
        """
        ids: list[int] = []
        text = StopText(self._prompt, self._stop_texts)
        while True:
            if expired():
                yield Step(None, text.finish(), "timeout")
                return
            if on_logits is not None:
                on_logits(logits)
            token = sampler.choose(logits, ids)
            if token in self._stop_ids:
                yield Step(None, text.finish(), "stop")
                return
            ids.append(token)
            piece = text.push(token)
            yield Step(token, piece)
            if text.stopped:
                yield Step(None, "", "stop")
                return
            if len(ids) >= max_tokens:
                yield Step(None, text.finish(), "length")
                return
            embeds = self._embeddings.lookup(np.array([token], np.int64))
            newest = make_tokens(cache.text_positions(1), TokenKind.ANSWER)
            logits = self._forward(cache, embeds, newest)


class StopText:
    """Streams text, holding back what might be the beginning of a stop text."""

    def __init__(self, prompt: Prompt, stops: tuple[str, ...]) -> None:
        self._stream = prompt.text_stream()
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is safe to show after one more token."""
        self._held += self._stream.push(token)
        return self._release(final=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        self._held += self._stream.finish()
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            piece, self._held = self._held[: min(ends)], ""
            return piece
        keep = 0 if final else self._suspects()
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def _suspects(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        return max(
            (
                size
                for stop in self._stops
                for size in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:size])
            ),
            default=0,
        )
