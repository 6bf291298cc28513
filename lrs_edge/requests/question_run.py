"""One question on its way: search, prefill, decode, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.answer import Answer, FinishReason, SegmentReport
from lrs_edge.answer.evidence import (
    kept_tokens,
    level_reports,
    regions,
    segment_reports,
    token_counts,
    unplaced_warning,
)
from lrs_edge.answer.trace import Trace
from lrs_edge.baselines.segments import SegmentCaches
from lrs_edge.baselines.tower import CompressedTiles
from lrs_edge.engines.rows import Embeds
from lrs_edge.errors import ReadStoppedError
from lrs_edge.language.kv_cache import KVCache, TokenKind
from lrs_edge.language.prompt import PromptTokens
from lrs_edge.language.sequence import TokenSequence, global_places
from lrs_edge.requests.answer_confidence import AnswerConfidence
from lrs_edge.requests.budget import FIRST_TOKENS, Budget
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.memory import peak_memory
from lrs_edge.requests.objects_note import ObjectsNote
from lrs_edge.requests.options import AskOptions
from lrs_edge.requests.progress import OnProgress, ProgressTeller
from lrs_edge.requests.question_plan import compressed_tiles, model_costs, plan_question
from lrs_edge.requests.scene_caches import SceneCaches
from lrs_edge.search.context import SearchContext, no_tiles
from lrs_edge.search.result import SearchResult
from lrs_edge.search.rfm import token_scores
from lrs_edge.search.search import Search, trim
from lrs_edge.stages import Stages
from lrs_edge.vision.tiles import TileSource

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster


class _TimeUpError(Exception):
    """The time limit passed before the language model had seen the global view."""


class _PrefillCutError(Exception):
    """The rest of a prefill would overrun; `places` of the sequence are in the cache."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.places = places


class QuestionRun:
    """One question on its way: search, prefill, decode.

    Made when the question is submitted: the time limit counts from there.

    Args:
        stages: The model.
        raster: The image.
        tiles: Gives tokens of its tiles.
        question: As asked.
        prompt: The text around the image.
        options: How.
        trace: Collects arrays, None for no trace.

    Raises:
        UsageError: The bundle cannot do what the options ask for.
        BundleError: The same.
    """

    def __init__(
        self,
        stages: Stages,
        raster: Raster,
        tiles: TileSource,
        question: str,
        prompt: PromptTokens,
        options: AskOptions,
        trace: Trace | None,
    ) -> None:
        self._stages = stages
        self._raster = raster
        self._question = question
        self._prompt = prompt
        self._trace = trace
        self._clock = Clock(options.timeout)
        plan = plan_question(stages, raster, options)
        self._options, self._pyramid, self._pruning = plan.options, plan.pyramid, plan.pruning
        self._warnings = [*stages.warnings, *raster.warnings, *plan.warnings]
        self._source = tiles
        self._compressed: CompressedTiles | None = None
        self._ids: list[int] = []
        self._text = ""
        self._evicted = 0
        self._finish: FinishReason = "stop"
        self._sent = self._text_tokens = 0
        self._result: SearchResult | None = None
        self._segments: tuple[SegmentReport, ...] = ()
        self._confidence = AnswerConfidence(stages, self._options, prompt)
        self._note = ObjectsNote(stages, question)

    @property
    def deadline(self) -> float | None:
        """When the time limit is over, by `time.monotonic`; None without one."""
        return self._clock.deadline

    def pieces(
        self,
        caches: SceneCaches,
        on_progress: OnProgress | None,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[str]:
        """Do the work; yields the answer's text as it comes.

        Args:
            caches: Of the scene.
            on_progress: Told about every step.
            is_given_up: True when nobody wants the answer any more.

        Raises:
            CancelledError: Nobody does.
        """
        self._caches = caches
        self._budget = budget = Budget(
            self._options,
            self._clock,
            self._stages.meter.rates,
            model_costs(self._stages),
            is_given_up=is_given_up,
        )
        self._progress = ProgressTeller(on_progress, len(self._pyramid.levels), budget.check)
        self._tiles = self._source.session(
            self._options.resampling, self._clock, self._progress.on_tile
        )
        self._compressed = compressed_tiles(
            self._stages, self._raster, self._options, self._clock, self._progress.on_tile
        )
        budget.asked(len(self._prompt.after) + self._stages.sequences.views_after)
        if self._compressed is None:
            budget.noted(self._note.most_tokens())
        try:
            prefix, after = self._around()
            if self._compressed is None:
                caches.expect(len(prefix))
            if budget.is_timed:
                self._fill_prefix(prefix)
            cache, logits = self._prompted(prefix, after)
        except (_TimeUpError, ReadStoppedError) as error:
            budget.check()
            if isinstance(error, ReadStoppedError):
                self._warnings.append(str(error))
            self._finish = "timeout"
            if self._result is None:
                self._result = self._nothing()
            return
        yield from self._decode(cache, logits)

    def _fill_prefix(self, prefix: TokenSequence) -> None:
        """Under a time limit the prompt's beginning is prefilled before the search.

        It is needed in any case, and shows how long the rest will take: the search can then leave
        time for it.
        """

        def on_part(*_: int) -> None:
            self._budget.check()
            if self._clock.expired():
                raise _TimeUpError

        on_part()
        if self._pruning is not None or self._compressed is not None:
            return
        llm, cache = self._stages.llm, self._caches.llm
        with self._clock.step("prefill"):
            llm.fill_prefix(cache, prefix.embeds, prefix.tokens, on_part)
            if not self._budget.knows_steps:
                llm.try_step(cache)

    def _prompted(
        self, prefix: TokenSequence, after: Embeds
    ) -> tuple[KVCache | SegmentCaches, NDArray[np.float32]]:
        """Search, and prefill what was found."""
        context = SearchContext(
            model=self._stages.search_model,
            pyramid=self._pyramid,
            tiles=self._tiles,
            prefix=prefix,
            after=after,
            options=self._options,
            budget=self._budget,
            on_level=self._progress.on_level,
            traced=self._trace is not None,
        )
        result = self._result = Search(context, self._caches.scoring, self._compressed).run()
        if self._compressed is None:
            self._note.read(context, result, self._trace)
        self._warnings += result.warnings
        sequence = self._final_sequence(prefix, after, result)
        if self._budget.is_timed:
            sequence = self._fitted_to_time(prefix, after, result, sequence)
        if self._trace is not None:
            self._trace.add_way(self._options.search, self._options.prune)
            self._trace.add_search(result, prefix, after)
            self._trace.add_final(sequence)
        self._progress.tell("prefill")
        with self._clock.step("prefill"):
            return self._prefill(sequence, prefix, after, result)

    def _fitted_to_time(
        self,
        prefix: TokenSequence,
        after: Embeds,
        result: SearchResult,
        sequence: TokenSequence,
    ) -> TokenSequence:
        """The sequence without the lowest-scored tokens whose prefill would overrun."""
        budget, cache = self._budget, self._caches.llm
        if budget.expired() and not budget.answers_late():
            budget.check()
            raise _TimeUpError
        most = budget.affordable_tokens()
        if most is None or len(result.final) <= most:
            return sequence
        if self._compressed is None and self._pruning is None:
            shared = min(len(prefix), len(sequence) - 1)
            llm = self._stages.llm
            if llm.remembers(cache, sequence.embeds, sequence.tokens, shared):
                return sequence
        trim(result, most, "the time limit", "timeout")
        return self._final_sequence(prefix, after, result)

    def _prefill(
        self,
        sequence: TokenSequence,
        prefix: TokenSequence,
        after: Embeds,
        result: SearchResult,
    ) -> tuple[KVCache | SegmentCaches, NDArray[np.float32]]:
        """The caches that hold the prompt, pruned as asked, and the logits [V] after it."""
        llm, cache = self._stages.llm, self._caches.llm
        if self._compressed is not None:
            # Its global view is another one, and may have the labels of the one that is shared.
            cache = llm.new_cache()
        if self._pruning is not None:
            pruned, logits = llm.prefill_pruned(sequence.embeds, sequence.tokens, self._pruning)
            self._segments = segment_reports(self._stages.manifest.llm.segments, pruned)
            if self._trace is not None:
                self._trace.add_segments(pruned.tokens)
            return pruned, logits
        shared = min(len(prefix), len(sequence) - 1)
        end = len(prefix) + len(result.final)

        def on_part(first: int, end_of_part: int) -> None:
            self._budget.check()
            if len(prefix) <= first < end and not self._budget.can_run(end_of_part - first):
                raise _PrefillCutError(first)

        try:
            logits = llm.prefill(cache, sequence.embeds, sequence.tokens, shared, on_part)
        except _PrefillCutError as cut:
            sequence = self._cut_short(prefix, after, result, cut.places - len(prefix))
            logits = llm.prefill(cache, sequence.embeds, sequence.tokens, shared)
        self._apply_kv_budget(cache, sequence, len(prefix), result)
        return cache, logits

    def _cut_short(
        self, prefix: TokenSequence, after: Embeds, result: SearchResult, sent: int
    ) -> TokenSequence:
        """The sequence with only the first local tokens: the prefill took longer than expected."""
        self._warnings.append(
            f"only the first {sent} of {len(result.final)} kept local tokens were sent: prefill "
            "took longer than the time limit allows"
        )
        if result.end == "finest_level":
            result.end = "timeout"
        places = np.arange(len(result.final))
        kept = np.flatnonzero((places < sent) | (result.final.is_frame & (sent > 0)))
        result.final_scores = result.final_scores[kept]
        result.final = result.final.take(kept)
        return self._final_sequence(prefix, after, result)

    def _around(self) -> tuple[TokenSequence, Embeds]:
        """What stands before and after the local tokens."""
        stages = self._stages
        self._progress.tell("encode")
        shown = self._tiles if self._compressed is None else self._compressed
        global_tokens = shown.global_tokens(self._pyramid.global_view)
        self._warnings += self._confidence.warnings(self._raster.info.gsd, shown.colours)
        prefix = stages.sequences.prefix(global_tokens)
        if self._trace is not None:
            self._trace.add_prompt(self._prompt)
            self._trace.add_pyramid(self._pyramid)
            self._trace.add_global(global_tokens)
        return prefix, stages.sequences.after(self._prompt.after, global_tokens)

    def _final_sequence(
        self, prefix: TokenSequence, after: Embeds, result: SearchResult
    ) -> TokenSequence:
        """Prefix, kept local tokens, objects, text after the image; positions without gaps."""
        start, kept = len(prefix), result.final
        whole = self._stages.sequences.final(prefix, kept, after, self._note.embeds)
        limit = self._stages.manifest.limits.max_length
        if len(whole) > limit:
            # Only the reference policy gets here: it cuts the end, the question included.
            self._warnings.append(
                f"the sequence of {len(whole)} tokens was cut to the model's {limit}; the "
                "reference policy cuts the end of the question"
            )
            whole = TokenSequence(whole.embeds[:limit], whole.tokens[:limit])
            sent = max(limit - start, 0)
            result.final = kept.take(np.arange(min(sent, len(kept))))
            result.final_scores = result.final_scores[:sent]
        text = np.isin(whole.tokens["kind"], (TokenKind.SYSTEM, TokenKind.QUESTION)).sum()
        self._text_tokens, self._sent = int(text), len(whole) - int(text)
        return whole

    def _apply_kv_budget(
        self, cache: KVCache, sequence: TokenSequence, start: int, result: SearchResult
    ) -> None:
        """Drop the lowest-scored vision tokens of a prompt whose local tokens begin at `start`."""
        budget = self._options.kv_budget
        if budget is None or len(cache) <= budget:
            return
        scores = np.zeros(len(cache), np.float32)
        if result.passes:
            views = global_places(sequence)
            inside = views < len(cache)
            scores[views[inside]] = token_scores(result.passes[-1].global_logits)[inside]
            kept = result.final_scores
            scores[start : start + len(kept)] = kept
        self._evicted = cache.evict(scores, budget)
        if len(cache) > budget:
            self._warnings.append(
                f"the KV budget of {budget} tokens cannot hold the prompt's text; {len(cache)} "
                "tokens were kept"
            )

    def _decode(self, cache: KVCache | SegmentCaches, logits: NDArray[np.float32]) -> Iterator[str]:
        options = self._options
        seen: list[NDArray[np.float32]] = []
        self._progress.tell("decode")
        room = self._stages.manifest.limits.max_length - self._sent - self._text_tokens
        most = options.max_tokens
        if options.policy == "full" and room < most:
            most = max(room, 1)
        steps = self._stages.llm.generate(
            cache,
            logits,
            self._confidence.chooser,
            max_tokens=most,
            expired=self._must_end,
            on_logits=seen.append if self._trace is not None else None,
        )
        while True:
            with self._clock.step("decode"):
                step = next(steps, None)
            if step is None:
                break
            if step.token is not None:
                self._ids.append(step.token)
            self._finish = step.finish_reason or self._finish
            if step.text:
                self._text += step.text
                yield step.text
        if self._finish == "stop":
            self._stages.meter.rates.answered(len(self._ids))
        if self._trace is not None:
            self._trace.add_decode(seen, self._ids)
            self._confidence.add_to(self._trace, len(self._ids))

    def _must_end(self) -> bool:
        """True when no further token is to be generated.

        A question that was searched and prefilled is not left without an answer for a few tokens.
        """
        self._budget.check()
        if not self._budget.expired():
            return False
        first = len(self._ids) < FIRST_TOKENS and not self._text.strip()
        return not (first and self._budget.answers_late())

    def _nothing(self) -> SearchResult:
        result = no_tiles(self._stages.search_model, self._pyramid)
        result.end_by("timeout", 0)
        self._warnings += result.warnings
        return result

    def too_late(self) -> Answer:
        """The answer to a question whose time limit passed before its turn came: none."""
        self._finish, self._result = "timeout", self._nothing()
        self._warnings.append("the time limit passed while the question waited for its turn")
        return self.answer()

    def answer(self) -> Answer:
        """The finished answer."""
        result = self._result
        assert result is not None
        raster, vision = self._raster, self._stages.vision
        located = regions(result, self._pyramid, raster.place)
        sure = self._confidence.certainty(len(self._ids))
        return Answer(
            text=self._text.strip(),
            question=self._question,
            finish_reason=self._finish,
            search_end=result.end,
            regions=located,
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
            timings=self._clock.timings(),
            peak_memory=peak_memory(),
            warnings=tuple(dict.fromkeys((*self._warnings, *unplaced_warning(located)))),
            token_ids=tuple(self._ids),
            model=self._stages.manifest.name,
            policy=self._options.policy,
            image_size=(raster.width, raster.height),
            search=self._options.search,
            prune=self._options.prune,
            segments=self._segments,
            objects=self._note.reports(raster.width, raster.height),
            stages=self._stages.places(),
            kept=kept_tokens(result, self._pyramid),
            confidence=self._confidence.value(len(self._ids)),
            margin=sure.margin,
            log_probability=sure.log_probability,
            least_log_probability=sure.least_log_probability,
        )
