"""One question on its way through the stages: search, prefill, decode, answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer import Answer, FinishReason, Timings
from lrs_edge.budget import Clock
from lrs_edge.cache import KVCache, TokenKind, Tokens
from lrs_edge.errors import UsageError
from lrs_edge.evidence import level_reports, regions, token_counts
from lrs_edge.memory import peak_memory
from lrs_edge.options import AskOptions, Resampling, merged_options
from lrs_edge.progress import OnProgress, ProgressTeller
from lrs_edge.prompt import PromptTokens
from lrs_edge.pyramid import Pyramid, build_pyramid, reference_fails
from lrs_edge.raster import Raster
from lrs_edge.rfm import token_scores
from lrs_edge.sampling import Sampler
from lrs_edge.search import Search
from lrs_edge.search_result import SearchResult
from lrs_edge.sequence import Sequence, build_prefix, build_suffix, concatenate
from lrs_edge.stages import Stages
from lrs_edge.tiles import TileSource
from lrs_edge.trace import Trace


class Caches:
    """KV caches of the RFM and the LLM of one scene, kept between its questions.

    Args:
        rfm: Cache of the RFM.
        llm: Cache of the LLM.
        resampling: How the global view in their prefix was read.
    """

    def __init__(self, rfm: KVCache, llm: KVCache, resampling: Resampling) -> None:
        self.rfm = rfm
        self.llm = llm
        self.resampling = resampling
        self._prefix: Tokens | None = None

    def expect(self, prefix: Tokens) -> None:
        """Name the tokens that are worth keeping after the question."""
        self._prefix = prefix

    def release(self) -> None:
        """Give back the memory of all but the prefix, or of all where that was touched."""
        for cache in (self.rfm, self.llm):
            whole = self._prefix is not None and cache.has_prefix(self._prefix)
            cache.release(len(self._prefix) if whole and self._prefix is not None else 0)


class Request:
    """One question on its way through the stages: search, prefill, decode."""

    def __init__(
        self,
        stages: Stages,
        raster: Raster,
        tiles: TileSource,
        caches: Caches,
        question: str,
        prompt: PromptTokens,
        options: AskOptions,
        on_progress: OnProgress | None,
        trace: Trace | None,
    ) -> None:
        self._stages = stages
        self._raster = raster
        self._caches = caches
        self._question = question
        self._prompt = prompt
        self._options = options
        self._trace = trace
        self._clock = Clock(options.timeout)
        self._warnings = [*stages.warnings, *raster.warnings]
        self._pyramid = self._build_pyramid()
        self._progress = ProgressTeller(on_progress, len(self._pyramid.levels))
        self._tiles = tiles.session(options.resampling, self._clock, self._progress.on_tile)
        self._ids: list[int] = []
        self._text = ""
        self._evicted = 0
        self._finish: FinishReason = "stop"
        self._sent = self._text_tokens = 0
        self._result: SearchResult | None = None

    def _build_pyramid(self) -> Pyramid:
        manifest, raster = self._stages.manifest, self._raster
        size = {"tile": manifest.vision.tile, "base_side": manifest.search.base_side}
        if self._options.policy == "reference":
            if self._options.max_tiles is not None:
                raise UsageError("the reference policy knows no tile budget; leave --max-tiles out")
            pyramid = build_pyramid(raster.height, raster.width, policy="reference", **size)
            if not reference_fails(pyramid, self._stages.vision.per_tile):
                return pyramid
            self._options = merged_options(self._options, {"policy": "full"})
            self._warnings.append(
                "the reference implementation fails on images of this shape; answered with the "
                "full policy"
            )
        return build_pyramid(raster.height, raster.width, policy="full", **size)

    def pieces(self) -> Iterator[str]:
        """Do the work; yields the answer's text as it comes."""
        prefix = self._prefix()
        self._caches.expect(prefix.tokens)
        after = self._stages.embeddings.lookup(self._prompt.after)
        search = Search(
            self._stages.search_model,
            self._pyramid,
            self._tiles,
            self._caches.rfm,
            prefix,
            after,
            self._options,
            self._clock,
            self._progress.on_level,
            traced=self._trace is not None,
        )
        result = self._result = search.run()
        self._warnings += result.warnings
        sequence = self._final_sequence(prefix, after, result)
        if self._trace is not None:
            self._trace.add_search(result, prefix, after)
            self._trace.add_final(sequence)
        self._progress.tell("prefill")
        with self._clock.stage("prefill"):
            logits = self._stages.llm.prefill(
                self._caches.llm,
                sequence.embeds,
                sequence.tokens,
                min(len(prefix), len(sequence) - 1),
            )
            self._apply_kv_budget(self._caches.llm, prefix, result)
        yield from self._decode(self._caches.llm, logits)

    def _prefix(self) -> Sequence:
        stages = self._stages
        self._progress.tell("encode")
        global_tokens = self._tiles.global_tokens(self._pyramid.global_view)
        separator = np.array([stages.manifest.prompt.separator_id], np.int64)
        prefix = build_prefix(
            stages.embeddings.lookup(self._prompt.before),
            global_tokens,
            stages.embeddings.lookup(separator),
        )
        if self._trace is not None:
            self._trace.add_prompt(self._prompt)
            self._trace.add_pyramid(self._pyramid)
            self._trace.add_global(global_tokens)
        return prefix

    def _final_sequence(
        self, prefix: Sequence, after: NDArray[np.float32], result: SearchResult
    ) -> Sequence:
        """Prefix, kept local tokens, text after the image; positions without gaps."""
        start, kept = len(prefix), result.final
        local = kept.sequence(start + np.arange(len(kept), dtype=np.int64))
        whole = concatenate(prefix, local, build_suffix(after, start + len(kept)))
        limit = self._stages.manifest.limits.max_length
        if len(whole) > limit:
            # Only the reference policy gets here: it cuts the end, the question included.
            self._warnings.append(
                f"the sequence of {len(whole)} tokens was cut to the model's {limit}; the "
                "reference policy cuts the end of the question"
            )
            whole = Sequence(whole.embeds[:limit], whole.tokens[:limit])
            sent = max(limit - start, 0)
            result.final = kept.take(np.arange(min(sent, len(kept))))
            result.final_scores = result.final_scores[:sent]
        text = np.isin(whole.tokens["kind"], (TokenKind.SYSTEM, TokenKind.QUESTION)).sum()
        self._text_tokens, self._sent = int(text), len(whole) - int(text)
        return whole

    def _apply_kv_budget(self, cache: KVCache, prefix: Sequence, result: SearchResult) -> None:
        budget = self._options.kv_budget
        if budget is None or len(cache) <= budget:
            return
        scores = np.zeros(len(cache), np.float32)
        if result.passes:
            views = np.flatnonzero(prefix.tokens["kind"] == TokenKind.GLOBAL)
            inside = views < len(cache)
            scores[views[inside]] = token_scores(result.passes[-1].global_logits)[inside]
            kept = result.final_scores
            scores[len(prefix) : len(prefix) + len(kept)] = kept
        self._evicted = cache.evict(scores, budget)
        if len(cache) > budget:
            self._warnings.append(
                f"the KV budget of {budget} tokens cannot hold the prompt's text; {len(cache)} "
                "tokens were kept"
            )

    def _decode(self, cache: KVCache, logits: NDArray[np.float32]) -> Iterator[str]:
        options = self._options
        sampler = Sampler(
            options.temperature,
            options.top_p,
            options.seed,
            self._stages.manifest.repetition_penalty,
            self._stages.manifest.penalised_ids,
        )
        seen: list[NDArray[np.float32]] = []
        self._progress.tell("decode")
        steps = self._stages.llm.generate(
            cache,
            logits,
            sampler,
            max_tokens=options.max_tokens,
            expired=self._clock.expired,
            on_logits=seen.append if self._trace is not None else None,
        )
        while True:
            with self._clock.stage("decode"):
                step = next(steps, None)
            if step is None:
                break
            if step.token is not None:
                self._ids.append(step.token)
            self._finish = step.finish_reason or self._finish
            if step.text:
                self._text += step.text
                yield step.text
        if self._trace is not None:
            self._trace.add_decode(seen, self._ids)

    def answer(self) -> Answer:
        """The finished answer."""
        result, clock = self._result, self._clock
        assert result is not None
        raster, vision = self._raster, self._stages.vision
        return Answer(
            text=self._text.strip(),
            question=self._question,
            finish_reason=self._finish,
            search_end=result.end,
            regions=regions(result, self._pyramid, raster.polygon),
            levels=level_reports(result),
            tokens=token_counts(
                result,
                global_tokens=vision.spec.grid**2,
                local_per_tile=vision.per_tile**2,
                sent=self._sent,
                text=self._text_tokens,
                evicted=self._evicted,
                generated=len(self._ids),
            ),
            timings=Timings(
                read=clock.seconds("read"),
                encode=clock.seconds("encode"),
                score=clock.seconds("prefix") + clock.seconds("score"),
                prefill=clock.seconds("prefill"),
                decode=clock.seconds("decode"),
                total=clock.elapsed,
            ),
            peak_memory=peak_memory(),
            warnings=tuple(dict.fromkeys(self._warnings)),
            token_ids=tuple(self._ids),
            model=self._stages.manifest.name,
            policy=self._options.policy,
            image_size=(raster.width, raster.height),
        )
