"""Running a decoder graph (LLM or RFM) over a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import DecoderSpec
from lrs_edge.engines.base import Graph
from lrs_edge.engines.rows import UNKNOWN, Embeds, Sources, sources_of
from lrs_edge.errors import BundleError, OutOfMemoryError
from lrs_edge.language.kv_cache import KVCache, Tokens
from lrs_edge.language.layers import check_layers, pass_on, run_layers

#: Tokens of a long prompt that run through the layers at once: attention holds heads x chunk x
#: keys numbers, which for a whole level of a scene would be most of the memory that is needed. No
#: slower than 512 on a CPU, and in `int8-dynamic`, whose scales are those of a run, nearer to fp32.
PREFILL_CHUNK = 256

#: The same on other devices, whose attention holds no such numbers and whose runs cost the same
#: however short they are; less where the memory does not hold what the layers compute.
DEVICE_CHUNK = 4096

#: Told before a part of a prompt runs: its first place in the sequence, and the one after it.
OnPart = Callable[[int, int], None]


class Decoder:
    """One stack of decoder layers.

    Args:
        graph: The graph; its inputs are checked against `spec`.
        spec: Shape of the stack.
        scoring: True for the RFM, whose last layer gives scores.
        axes: Positions k that a token has.
        longest: Tokens of the longest sequence; None where that is not known.
        load_masked: Loads the flavour with an attention bias, called when that is first needed
            (only the reference policy does); None where there is none.

    Raises:
        BundleError: The graph's inputs or outputs are not those of its role.
    """

    def __init__(
        self,
        graph: Graph,
        spec: DecoderSpec,
        *,
        scoring: bool,
        axes: int = 1,
        longest: int | None = None,
        load_masked: Callable[[], Graph] | None = None,
    ) -> None:
        names = [f"{part}_{i}" for i in range(spec.layers) for part in ("key", "value")]
        if scoring:
            names.append(f"key_{spec.layers}")
            # Layers of the language model run the scoring layer's attention as well.
            if f"past_value_{spec.layers}" in graph.inputs:
                names.append(f"value_{spec.layers}")
        self.spec = spec
        self._scoring = scoring
        self._names = names
        self._graph = graph
        self._load_masked = load_masked
        self._masked: Graph | None = None
        self._axes = axes
        self._longest = longest
        self._device_chunk = DEVICE_CHUNK
        check_layers(graph, graph.name, spec, names, ("logits",), axes=axes)

    @property
    def graph_name(self) -> str:
        """File of the graph, under which its runs are counted."""
        return self._graph.name

    def new_cache(self) -> KVCache:
        """An empty cache on the graph's device."""
        return KVCache(self._graph.new_buffers(self._names), self._longest)

    @property
    def chunk(self) -> int:
        """Tokens that run at once: as many as have fitted into the device's memory so far."""
        return PREFILL_CHUNK if self._graph.device == "cpu" else self._device_chunk

    def _masked_graph(self) -> Graph:
        if self._load_masked is None:
            raise BundleError(
                "this bundle has no masked RFM graph, which the reference policy needs; "
                "export the bundle again, or use --policy full"
            )
        if self._masked is None:
            graph = self._load_masked()
            more = ("attention_bias",)
            check_layers(
                graph, graph.name, self.spec, self._names, ("logits",), more, axes=self._axes
            )
            self._masked = graph
        return self._masked

    def forward(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        attention_bias: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Run new tokens through the layers; the cache holds them afterwards.

        Args:
            cache: What the new tokens can attend to, besides those before them.
            embeds: float32 [L, D], L at least 1.
            tokens: Labels [L] with the positions for RoPE.
            attention_bias: float32 [L, cached + L] added to the attention logits; needs the
                masked flavour.

        Returns:
            The graph's `logits`: [1, V] of the LLM, [H, cached + L] of the RFM.

        Raises:
            BackendError: The engine fails, or gives numbers that are not finite.
            BundleError: The logits have another shape than the manifest says, or a bias is given
                and the bundle has no masked flavour.
        """
        cache.reserve(len(tokens))
        return self._run(
            cache, embeds, tokens, None, attention_bias, _boundaries(self.chunk, len(tokens))
        )

    def prefill(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        ends: Sequence[int],
        attention_bias: NDArray[np.float32] | None = None,
        on_part: OnPart | None = None,
    ) -> NDArray[np.float32]:
        """Make a cache hold exactly this sequence; what it holds of it already is not run again.

        The sequence runs in parts that do not depend on what is there, and a part is reused only
        where the cache computed the same part, no longer and no shorter (two sequences that begin
        alike are cut alike up to where the shorter one ends, not there). So the numbers are the
        same as from an empty cache, even where an engine quantizes by the part.

        Args:
            cache: Anything.
            embeds: float32 [T, D], the whole sequence.
            tokens: Its labels [T].
            ends: Ascending lengths at which this sequence and later ones may part; up to the last
                of them its tokens can be recognised later. If that is T, so can be the result.
            attention_bias: float32 [T - ends[0], T] as in `forward`, for the tokens after the
                first end, which are then never recognised.
            on_part: Called before each part that is run; what it raises ends the prefill, and the
                cache then holds the parts before.

        Returns:
            As `forward`.
        """
        chunk = self.chunk
        try:
            return self._prefill(cache, embeds, tokens, ends, attention_bias, on_part)
        except OutOfMemoryError:
            if self.chunk == chunk:
                raise
        return self.prefill(cache, embeds, tokens, ends, attention_bias, on_part)

    def _prefill(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        ends: Sequence[int],
        attention_bias: NDArray[np.float32] | None,
        on_part: OnPart | None,
    ) -> NDArray[np.float32]:
        total = len(tokens)
        known = ends[0] if attention_bias is not None else ends[-1]
        sources = np.full(total, UNKNOWN, np.uint64)
        sources[:known] = sources_of(embeds)[:known]
        bounds = _boundaries(self.chunk, *ends, total)
        alike = cache.computed_alike(tokens, sources, bounds)
        if alike == total:
            cache.truncate(total)
            if (output := cache.output) is not None:
                return output
        start = max(bound for bound in bounds if bound <= min(alike, total - 1))
        cache.truncate(start)
        cache.reserve(total - start)
        head = ends[0]
        if attention_bias is not None and start < head:
            part = slice(start, head)
            runs = [bound - start for bound in bounds if start <= bound <= head]
            self._run(cache, embeds[part], tokens[part], sources[part], None, runs, on_part)
            start = head
        runs = [bound - start for bound in bounds if bound >= start]
        logits = self._run(
            cache, embeds[start:], tokens[start:], sources[start:], attention_bias, runs, on_part
        )
        if known == total:
            cache.remember(logits)
        return logits

    def begins_with(self, cache: KVCache, embeds: Embeds, tokens: Tokens, *ends: int) -> bool:
        """Whether a cache begins with this sequence, computed as `prefill` with these ends would.

        The sequence's own end is one of them.
        """
        bounds = _boundaries(self.chunk, *ends, len(tokens))
        return cache.computed_alike(tokens, sources_of(embeds), bounds) == len(tokens)

    def _run(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        sources: Sources | None,
        attention_bias: NDArray[np.float32] | None,
        bounds: Sequence[int],
        on_part: OnPart | None = None,
    ) -> NDArray[np.float32]:
        """Run new tokens part by part between the bounds, the first 0, the last their number."""
        logits = np.zeros(0, np.float32)
        for start, end in pairwise(bounds):
            part = slice(start, end)
            if on_part is not None:
                on_part(len(cache), len(cache) + end - start)
            bias = None
            if attention_bias is not None:
                bias = attention_bias[part, : len(cache) + end - start]
            known = None if sources is None else sources[part]
            try:
                logits = self._step(
                    cache, embeds[part], tokens[part], known, bias, last=end == bounds[-1]
                )
            except OutOfMemoryError:
                self._device_chunk = max(min(self._device_chunk, end - start) // 2, PREFILL_CHUNK)
                raise
        return logits

    def _step(
        self,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        sources: Sources | None,
        attention_bias: NDArray[np.float32] | None,
        *,
        last: bool,
    ) -> NDArray[np.float32]:
        """Run one part; only the last one's logits are of use, and need not come from a device."""
        graph = self._graph
        more: dict[str, NDArray[np.generic]] = {}
        if attention_bias is not None:
            graph = self._masked_graph()
            more["attention_bias"] = np.ascontiguousarray(attention_bias)[None, None]
        if graph.device != "cpu" and not last:
            pass_on(graph, cache, embeds, tokens, "logits", more, sources)
            return np.zeros(0, np.float32)
        (logits,) = run_layers(graph, graph.name, cache, embeds, tokens, ("logits",), more, sources)
        wanted = (self.spec.heads, len(cache)) if self._scoring else (1, self.spec.vocabulary)
        if logits.shape != wanted:
            raise BundleError(
                f"{graph.name} gives logits {logits.shape}, the manifest says {wanted}; "
                "export the bundle again"
            )
        return logits


def _boundaries(chunk: int, *ends: int) -> list[int]:
    """0, the ends, and places every `chunk` tokens after each of them.

    The places depend on nothing after them, so that sequences with a common start are cut alike.
    """
    bounds = [0]
    for end in sorted(set(ends) - {0}):
        bounds += [*range(bounds[-1] + chunk, end, chunk), end]
    return bounds
