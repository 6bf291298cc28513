"""The language model cut into segments of layers, so that tokens can be dropped between them.

Layers before a cut keep all tokens in their KV caches, layers after it only the kept ones, each at
its own position. Equal to one graph whose layers mask the dropped tokens as keys: a dropped token's
hidden state is not seen by any other after the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrs_edge.baselines.inside import VISION, PruningPlan, kept_count, kept_places
from lrs_edge.bundle.manifest import DecoderSpec, SegmentSpec
from lrs_edge.engines.base import Graph, Tensor
from lrs_edge.engines.rows import Embeds
from lrs_edge.errors import BundleError
from lrs_edge.language.decoder import PREFILL_CHUNK
from lrs_edge.language.kv_cache import KVCache, Tokens
from lrs_edge.language.layers import check_layers, pass_on, run_layers

_STATES = "hidden_states"


class SegmentCaches:
    """One KV cache per segment; all end with the same token.

    Args:
        caches: From the first segment to the last.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = tuple(caches)

    def text_positions(self, count: int) -> NDArray[np.int64]:
        """Positions int64 [k, count] of text after the cached tokens; gaps stay gaps."""
        return self.caches[-1].text_positions(count)

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """Labels of the tokens in every cache."""
        return tuple(cache.tokens for cache in self.caches)


class _Output(NamedTuple):
    """Of one segment: hidden states [L, D] or logits [1, V], and the ranking [H, T] if asked."""

    values: NDArray[np.float32]
    ranking: NDArray[np.float32] | None


class SegmentedDecoder:
    """The LLM's layers as a chain of graphs.

    Args:
        graphs: One per segment.
        spec: Shape of the stack; `spec.segments` says which layers each graph has.
        axes: Positions k that a token has.

    Raises:
        BundleError: A graph's inputs or outputs are not those of its role.
    """

    def __init__(self, graphs: Sequence[Graph], spec: DecoderSpec, axes: int = 1) -> None:
        self._spec = spec
        self._graphs = tuple(graphs)
        self._names = tuple(_buffer_names(spec, segment) for segment in spec.segments)
        for number, graph in enumerate(graphs):
            last = number == len(graphs) - 1
            outputs = ("logits",) if last else (_STATES, "attention", "next_attention")
            name = spec.segments[number].graph
            check_layers(
                graph, name, spec, self._names[number], outputs, axes=axes, inner=number > 0
            )

    def prefill(
        self, embeds: Embeds, tokens: Tokens, plan: PruningPlan
    ) -> tuple[SegmentCaches, NDArray[np.float32]]:
        """Run a prompt through all segments, dropping vision tokens at the plan's cuts.

        Args:
            embeds: float32 [T, D].
            tokens: Labels [T]; the last one is text.
            plan: Where tokens are dropped, and how many.

        Returns:
            Caches with what each segment saw, and logits float32 [1, V] of the last token.
        """
        caches = SegmentCaches(
            [
                KVCache(graph.new_buffers(names))
                for graph, names in zip(self._graphs, self._names, strict=True)
            ]
        )
        vision = int(np.isin(tokens["kind"], VISION).sum())
        states = embeds
        for number, segment in enumerate(self._spec.segments):
            keep = plan.keeps.get(segment.first_layer + segment.layers)
            cache = caches.caches[number]
            found = self._run(number, cache, states, tokens, "" if keep is None else plan.ranking)
            states = found.values
            if keep is not None and found.ranking is not None:
                places = kept_places(tokens, found.ranking, kept_count(vision, keep))
                states, tokens = states[places], tokens[places]
        return caches, np.asarray(states)

    def forward(self, caches: SegmentCaches, embeds: Embeds, tokens: Tokens) -> NDArray[np.float32]:
        """Run a few new tokens through all segments at once; nothing is dropped.

        The states between segments stay on the device.

        Args:
            caches: Hold the tokens before them; afterwards these too.
            embeds: float32 [L, D], L at least 1.
            tokens: Labels [L].

        Returns:
            Logits float32 [1, V] of the last token.
        """
        states: Embeds | Tensor = embeds
        *inner, cache = caches.caches
        for number, behind in enumerate(inner):
            behind.reserve(len(tokens))
            states = pass_on(self._graphs[number], behind, states, tokens, _STATES)
        cache.reserve(len(tokens))
        name = self._spec.segments[-1].graph
        (logits,) = run_layers(self._graphs[-1], name, cache, states, tokens, ("logits",))
        self._check_shapes(name, logits, None, len(tokens), len(cache), last=True)
        return logits

    def _run(
        self,
        number: int,
        cache: KVCache,
        embeds: Embeds,
        tokens: Tokens,
        ranking: str,
    ) -> _Output:
        """Run one segment in chunks.

        Args:
            number: Of the segment.
            cache: Its cache.
            embeds: float32 [L, D], embeddings or the states of the segment before.
            tokens: Labels [L].
            ranking: Output that ranks tokens, empty for none.
        """
        last = number == len(self._graphs) - 1
        name = self._spec.segments[number].graph
        outputs = ["logits" if last else _STATES] + ([ranking] if ranking else [])
        cache.reserve(len(tokens))
        parts: list[NDArray[np.float32]] = []
        rows: NDArray[np.float32] | None = None
        for start in range(0, len(tokens), PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            found = run_layers(
                self._graphs[number], name, cache, embeds[part], tokens[part], outputs
            )
            # Only the last chunk ends with the prompt's last token.
            parts = [found[0]] if last else [*parts, found[0][0]]
            rows = found[1] if ranking else None
        values = parts[0] if last else np.concatenate(parts)
        self._check_shapes(name, values, rows, len(tokens), len(cache), last=last)
        return _Output(values, rows)

    def _check_shapes(
        self,
        name: str,
        values: NDArray[np.float32],
        ranking: NDArray[np.float32] | None,
        new: int,
        total: int,
        *,
        last: bool,
    ) -> None:
        wanted = (1, self._spec.vocabulary) if last else (new, self._spec.hidden)
        sound = values.shape == wanted
        if ranking is not None:
            sound = sound and ranking.shape == (self._spec.heads, total)
        if not sound:
            raise BundleError(
                f"{name} gives shapes that differ from the manifest's; export the bundle again"
            )


def _buffer_names(spec: DecoderSpec, segment: SegmentSpec) -> tuple[str, ...]:
    end = segment.first_layer + segment.layers
    names = [f"{part}_{i}" for i in range(segment.first_layer, end) for part in ("key", "value")]
    if end < spec.layers:
        names.append(f"key_{end}")
    return tuple(names)
