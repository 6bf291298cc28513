"""The stages that run graphs: encode, rfm, prefill, decode, through the objects that `ask` uses.

Pixels and embeddings are random: no engine's time depends on what they show. Every repetition draws
new ones, so that nothing that the runtime remembers about earlier tokens can be used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.benchmarking.floor import (
    Arithmetic,
    Work,
    decoder_arithmetic,
    graph_work,
    vision_arithmetic,
    weight_bytes,
)
from lrs_edge.benchmarking.measure import Measurement, Stopwatch, Timed, repeat
from lrs_edge.bundle.bundle import Bundle
from lrs_edge.bundle.manifest import DecoderSpec
from lrs_edge.engines.metered import GraphWork
from lrs_edge.engines.rows import Rows, block_sources, new_block
from lrs_edge.evaluation.flops import graph_costs
from lrs_edge.language.kv_cache import KVCache
from lrs_edge.language.sampling import Sampler
from lrs_edge.language.sequence import TokenSequence, concatenate
from lrs_edge.pyramid.levels import TileIndex, TokenGrid, build_pyramid
from lrs_edge.stages import Stages

#: Work of graphs by their path in the bundle, as a meter has it.
Counts = dict[str, GraphWork]

_QUESTION = "What can be seen in this image?"


class EngineBench:
    """Measures the stages of a loaded bundle.

    Args:
        bundle: The bundle.
        stages: Its stages, loaded.
        repetitions: How often each stage runs.
        warmup: Whether one repetition goes before, untimed.
    """

    def __init__(self, bundle: Bundle, stages: Stages, repetitions: int, *, warmup: bool) -> None:
        self._bundle = bundle
        self._stages = stages
        self._repetitions = repetitions
        self._warmup = warmup
        self._rng = np.random.default_rng(0)
        self._costs = graph_costs(bundle.manifest)

    def encode(self, tiles: int) -> Measurement:
        """Tiles through the vision encoder, in batches as large as the runtime makes them."""
        vision = self._stages.vision
        spec = vision.spec
        batch = min(vision.batch_size, tiles)
        shape = spec.tile, spec.tile, 3
        ready = [vision.ready(self._rng.random(shape, np.float32)) for _ in range(batch)]
        level = build_pyramid(
            spec.tile, spec.tile * batch, tile=spec.tile, base_side=spec.tile * batch
        ).levels[0]
        places = [(level, TileIndex(0, number)) for number in range(batch)]
        counts = [batch] * (tiles // batch) + [tiles % batch] * (tiles % batch > 0)

        def encode_all() -> None:
            for count in counts:
                for _ in vision.features(ready[:count], "local", places[:count]):
                    pass

        before: Counts = {}

        def once(watch: Stopwatch) -> None:
            before.update(self._stages.meter.read())
            watch.time(encode_all)

        timed = self._repeat(once)
        moved = 4 * tiles * (3 * spec.tile**2 + spec.grid**2 * self._stages.manifest.llm.width)
        work = self._work(before, vision_arithmetic(spec.precision), data=moved)
        parameters = f"{tiles} tiles in batches of {batch}"
        return _measurement(
            "encode", parameters, timed, work, unit="tile", units=tiles, tokens=tiles * spec.grid**2
        )

    def rfm(self, tiles: int) -> Iterator[Measurement]:
        """The prefix of a scene, then one level of tiles with a question after that prefix."""
        focus, spec = self._stages.focus, self._stages.manifest.rfm
        if focus is None or spec is None:
            return
        cache = focus.new_cache()
        shown = min(tiles, self._most_tiles())
        prefix = self._prefix()
        level = self._level(prefix, shown)

        before: Counts = {}

        def fill(watch: Stopwatch) -> None:
            fresh = self._prefix()
            cache.truncate(0)
            before.update(self._stages.meter.read())
            watch.time(lambda: focus.fill_prefix(cache, fresh.embeds, fresh.tokens))

        timed = self._repeat(fill)
        work = self._decoder_work(spec, before, cache)
        parameters = f"prefix of {len(prefix)} tokens"
        yield _measurement(
            "rfm", parameters, timed, work, unit="scene", units=1, tokens=len(prefix)
        )

        def score(watch: Stopwatch) -> None:
            fresh = self._prefix()
            whole = concatenate(fresh, self._level(fresh, shown))
            focus.fill_prefix(cache, fresh.embeds, fresh.tokens)
            before.update(self._stages.meter.read())
            watch.time(lambda: focus.logits(cache, whole.embeds, whole.tokens, [len(fresh)]))

        timed = self._repeat(score)
        work = self._decoder_work(spec, before, cache)
        parameters = f"level of {shown} tiles, {len(level)} tokens"
        yield _measurement(
            "rfm", parameters, timed, work, unit="question", units=1, tokens=len(level)
        )

    def prefill(self, length: int) -> Measurement:
        """A prompt of some tokens into an empty KV cache of the language model."""
        llm, spec = self._stages.llm, self._stages.manifest.llm
        cache = llm.new_cache()

        before: Counts = {}

        def once(watch: Stopwatch) -> None:
            text = self._text(length)
            cache.truncate(0)
            before.update(self._stages.meter.read())
            watch.time(lambda: llm.prefill(cache, text.embeds, text.tokens, 0))

        timed = self._repeat(once)
        work = self._decoder_work(spec, before, cache)
        parameters = f"{length} tokens"
        return _measurement(
            "prefill", parameters, timed, work, unit="prompt", units=1, tokens=length
        )

    def decode(self, count: int, depth: int) -> Measurement:
        """Tokens one by one after a filled KV cache, with sampling and text as in `ask`."""
        llm, spec = self._stages.llm, self._stages.manifest.llm
        cache = llm.new_cache()
        plain = self._plain_tokens()
        before: Counts = {}

        def once(watch: Stopwatch) -> None:
            logits = np.zeros(spec.vocabulary, np.float32)
            cache.truncate(0)
            if depth:
                text = self._text(depth)
                logits = llm.prefill(cache, text.embeds, text.tokens, 0)
            sampler = _Given(plain, self._stages.manifest.repetition_penalty)
            steps = llm.generate(
                cache, logits, sampler, max_tokens=count + 1, expired=lambda: False
            )
            # The first token comes from the prompt's logits, without a run of the graph.
            next(steps)
            before.update(self._stages.meter.read())
            watch.time(lambda: [next(steps) for _ in range(count)])

        timed = self._repeat(once)
        work = self._decoder_work(spec, before, cache)
        parameters = f"{count} tokens after {depth}"
        return _measurement(
            "decode", parameters, timed, work, unit="token", units=count, tokens=count
        )

    def _repeat(self, once: Callable[[Stopwatch], object]) -> Timed:
        return repeat(once, self._repetitions, warmup=self._warmup)

    def _work(
        self,
        before: Mapping[str, GraphWork],
        arithmetic: tuple[Arithmetic, ...],
        *,
        place: int = 0,
        data: int = 0,
    ) -> Work | None:
        """What the one graph that ran since `before` had to do.

        None where the manifest lacks the sizes that operations follow from.
        """
        ((graph, done),) = self._stages.meter.since(before).items()
        if self._costs is None or graph not in self._costs:
            return None
        weights = weight_bytes(self._bundle, graph)
        return graph_work(
            done, self._costs[graph], weights=weights, arithmetic=arithmetic, place=place, data=data
        )

    def _decoder_work(
        self, spec: DecoderSpec, before: Mapping[str, GraphWork], cache: KVCache
    ) -> Work | None:
        place = cache.buffers.nbytes // cache.buffers.capacity
        return self._work(before, decoder_arithmetic(spec.precision), place=place)

    def _noise(self, count: int, width: int) -> Rows:
        """Embeddings that differ from all others, as those of a tile not seen before."""
        return Rows.of(self._random(count, width), block_sources(new_block(), count))

    def _random(self, count: int, width: int) -> NDArray[np.float32]:
        return self._rng.standard_normal((count, width), np.float32)

    def _plain_tokens(self) -> tuple[int, ...]:
        """Ids of a text that ends no answer."""
        prompt = self._stages.manifest.prompt
        ids = self._stages.prompt.tokens(_QUESTION, "").after.tolist()
        return tuple(token for token in ids if token not in prompt.stop_ids)

    def _text(self, length: int) -> TokenSequence:
        """Tokens of random words, at positions from 0."""
        ids = self._rng.integers(0, self._stages.manifest.llm.vocabulary, length)
        return self._stages.sequences.suffix(self._stages.sequences.text(ids), 0)

    def _prefix(self) -> TokenSequence:
        """Text before the image, a global view that shows noise, separator."""
        stages = self._stages
        view = self._noise(stages.vision.spec.grid**2, stages.manifest.llm.width)
        return stages.sequences.prefix(view)

    def _level(self, prefix: TokenSequence, tiles: int) -> TokenSequence:
        """A level of so many tiles that show noise, nearly square, and the question after it."""
        stages = self._stages
        cols = math.isqrt(tiles - 1) + 1
        rows = -(-tiles // cols)
        side = stages.vision.per_tile
        grid = TokenGrid(rows * side, cols * side, side, rows, cols)
        hidden = stages.manifest.llm.width
        features = {
            TileIndex(place // cols, place % cols): self._noise(side * side, hidden)
            for place in range(tiles)
        }
        local = stages.sequences.local(grid, features, 0, close_gaps=True)
        asked = stages.prompt.tokens(_QUESTION, "").after
        after = stages.sequences.after(asked, self._noise(stages.vision.spec.grid**2, hidden))
        return concatenate(*stages.sequences.behind(prefix, local, after))

    def _most_tiles(self) -> int:
        """Tiles of a level that stays in the positions which the RFM was made for, at least 1."""
        stages = self._stages
        side = stages.vision.per_tile
        text = stages.prompt.tokens(_QUESTION, "")
        taken = len(text.before) + stages.vision.spec.grid**2 + 1 + len(text.after)
        # No tile needs more than one newline per row of its own.
        return max((stages.manifest.limits.max_positions - taken) // (side * side + side), 1)


class _Given(Sampler):
    """Chooses as `Sampler` does, then takes given tokens, so that no answer ends early."""

    def __init__(self, tokens: Sequence[int], repetition_penalty: float) -> None:
        super().__init__(0.0, 1.0, 0, repetition_penalty)
        self._tokens = tokens

    def choose(self, logits: NDArray[np.float32], generated: list[int]) -> int:
        """See `Sampler.choose`."""
        super().choose(logits, generated)
        return self._tokens[len(generated) % len(self._tokens)]


def _measurement(
    stage: str,
    parameters: str,
    timed: Timed,
    work: Work | None,
    *,
    unit: str,
    units: int,
    tokens: int,
) -> Measurement:
    return Measurement(
        stage=stage,
        parameters=parameters,
        seconds=timed.seconds,
        unit=unit,
        units=units,
        rate_unit="tokens/s",
        rated=tokens,
        work=work,
        peak=timed.peak,
        growth=timed.growth,
        reads=timed.reads,
    )
