"""Running a graph of decoder layers once over a KV cache, and checking that it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lrs_edge.bundle.manifest import DecoderSpec
from lrs_edge.engines.base import Feed, Graph, Tensor
from lrs_edge.engines.rows import Embeds, Rows, Sources
from lrs_edge.errors import BackendError, BundleError
from lrs_edge.language.kv_cache import KVCache, Tokens, position_ids


def check_layers(
    graph: Graph,
    name: str,
    spec: DecoderSpec,
    buffers: Sequence[str],
    outputs: Sequence[str],
    extra: Sequence[str] = (),
    *,
    axes: int = 1,
    inner: bool = False,
) -> None:
    """Check a graph of decoder layers against its role.

    Args:
        graph: The graph.
        name: Its file, for messages.
        spec: Shape of the stack.
        buffers: Key/value buffers without `past_`, such as `key_0`.
        outputs: Outputs besides the buffers.
        extra: Inputs besides the usual ones.
        axes: Positions k that a token has.
        inner: The graph takes hidden states, not embeddings.

    Raises:
        BundleError: The graph's inputs or outputs are others.
    """
    wanted = {"inputs_embeds", "position_ids", "past_length", *extra}
    wanted |= {f"past_{part}" for part in buffers}
    if set(graph.inputs) - {"total_length"} != wanted:
        odd = sorted(set(graph.inputs) ^ wanted)
        raise BundleError(
            f"{name} does not have the inputs of its role ({', '.join(odd[:4])} "
            "missing or unknown); export the bundle again"
        )
    given = set(outputs) | {f"present_{part}" for part in buffers}
    if not given <= set(graph.outputs):
        raise BundleError(
            f"{name} lacks the outputs {sorted(given - set(graph.outputs))[:4]}; "
            "export the bundle again"
        )
    embeds = graph.inputs["inputs_embeds"]
    if embeds.dtype != "float32" or len(embeds.shape) != 3:
        raise BundleError(
            f"{name}: inputs_embeds must be float32 [1, L, D]; export the bundle again"
        )
    width = spec.hidden if inner else spec.width
    if embeds.shape[2] not in (None, width):
        raise BundleError(
            f"{name}: inputs_embeds has width {embeds.shape[2]}, the manifest says {width}; "
            "export the bundle again"
        )
    positions = graph.inputs["position_ids"].shape
    if len(positions) != 2 or positions[0] not in (None, axes):
        raise BundleError(
            f"{name}: position_ids has shape {positions}, the manifest says {axes} positions for "
            "each token; export the bundle again"
        )
    past = graph.inputs[f"past_{buffers[0]}"].shape
    if past != (1, spec.kv_heads, None, spec.head_dim):
        raise BundleError(
            f"{name}: past_{buffers[0]} has shape {past}, the manifest says "
            f"{spec.kv_heads} heads of {spec.head_dim}; export the bundle again"
        )


def run_layers(
    graph: Graph,
    name: str,
    cache: KVCache,
    embeds: Embeds | Tensor,
    tokens: Tokens,
    outputs: Sequence[str],
    more: Mapping[str, NDArray[np.generic]] | None = None,
    sources: Sources | None = None,
) -> list[NDArray[np.float32]]:
    """Run new tokens through a graph of decoder layers once; the cache holds them afterwards.

    Args:
        graph: The graph.
        name: Its file, for messages.
        cache: What the new tokens can attend to; it has room for them.
        embeds: float32 [L, D], or what a graph gave [1, L, D].
        tokens: Labels [L].
        outputs: Outputs to return.
        more: Inputs besides the usual ones.
        sources: Of the embeddings [L], where they are worth recognising later.

    Raises:
        BackendError: The engine fails, or gives numbers that are not finite.
    """
    feeds = _feeds(graph, cache, embeds, tokens) | dict(more or {})
    found = graph.run(feeds, outputs, cache.buffers)
    if not all(np.isfinite(values).all() for values in found):
        raise BackendError(
            f"{name} gave numbers that are not finite; the weights are damaged, or "
            "overflow in this precision: export the bundle at a higher one"
        )
    cache.append(tokens, sources)
    return found


def pass_on(
    graph: Graph,
    cache: KVCache,
    embeds: Embeds | Tensor,
    tokens: Tokens,
    output: str,
    more: Mapping[str, NDArray[np.generic]] | None = None,
    sources: Sources | None = None,
) -> Tensor:
    """Run new tokens as `run_layers` does; the output stays on the device, for another graph.

    It is not looked at: what is not finite in it stays so to the last graph's logits.

    Returns:
        float32 [1, L, D], where the output is hidden states.
    """
    feeds = _feeds(graph, cache, embeds, tokens) | dict(more or {})
    (states,) = graph.run_on_device(feeds, [output], cache.buffers)
    cache.append(tokens, sources)
    return states


def _feeds(
    graph: Graph, cache: KVCache, embeds: Embeds | Tensor, tokens: Tokens
) -> dict[str, Feed]:
    given: Feed
    if isinstance(embeds, Rows):
        given = embeds.on(graph)
    elif isinstance(embeds, np.ndarray):
        given = embeds[None].astype(np.float32, copy=False)
    else:
        given = embeds
    feeds: dict[str, Feed] = {
        "inputs_embeds": given,
        "position_ids": position_ids(tokens),
        "past_length": np.array([len(cache)], np.int64),
    }
    if "total_length" in graph.inputs:
        feeds["total_length"] = np.array([len(cache) + len(tokens)], np.int32)
    return feeds
