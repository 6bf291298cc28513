"""Floating-point operations of one question, from the sizes in the manifest and what was computed.

A multiplication and an addition are two operations. Only matrix products, convolutions and
attention are counted. For a decoder of width D with H query heads and G key heads of width d, MLP
width F and vocabulary V:

    per new token and layer     2 (2 D H d + 2 D G d + 3 D F)   q and o, k and v, gate, up, down
    per new token and key seen  4 H d per layer                 scores and weighted sum, causal
    per run of the LLM          2 D V                           logits of the last token
    RFM's scoring layer         2 D G d per token, and per run 2 D H d; its scores are 2 H d per key
                                of the last token only, and left out
    an RFM of the LLM's layers  runs its scoring layer: 2 (D H d + 2 D G d) per token, and
                                4 H d per key seen
    between two segments        as the scoring layer, for the attention by which tokens are dropped

A tile costs what the exporter counted in the vision graph (`VisionSpec.flops`, `TowerSpec.flops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lrs_edge.bundle.manifest import DecoderSpec, Flavour, Manifest, StageSpec
from lrs_edge.engines.metered import GraphWork


@dataclass(frozen=True)
class GraphCost:
    """Operations of one graph per unit of its work, and the stage it belongs to."""

    stage: str
    per_tile: int = 0
    per_token: int = 0
    per_pair: int = 0
    per_run: int = 0

    def of(self, work: GraphWork) -> int:
        """Operations of some work."""
        return (
            self.per_tile * work.tiles
            + self.per_token * work.tokens
            + self.per_pair * work.pairs
            + self.per_run * work.runs
        )


@dataclass(frozen=True)
class Flops:
    """Operations of one question by stage."""

    vision: int
    rfm: int
    llm: int

    @property
    def total(self) -> int:
        """Of all stages."""
        return self.vision + self.rfm + self.llm


def graph_costs(manifest: Manifest) -> dict[str, GraphCost] | None:
    """Costs of a bundle's graphs by their path; None where the manifest lacks a size."""
    vision, rfm, llm = manifest.vision, manifest.rfm, manifest.llm
    if min(vision.flops, *(spec.intermediate for spec in manifest.decoders)) <= 0:
        return None
    stages: list[tuple[StageSpec, GraphCost]] = [
        (vision, GraphCost("vision", per_tile=vision.flops)),
        (llm, _decoder_cost("llm", llm, llm.layers, scores=False)),
    ]
    if rfm is not None:
        cost = _decoder_cost("rfm", rfm, rfm.layers, scores=True)
        stages.append((rfm, _with_attention(cost, rfm) if llm.has(Flavour.GQA_REST) else cost))
    # All flavours of a stage compute the same.
    costs = {file.path: cost for stage, cost in stages for file in stage.graphs}
    tower = vision.tower
    # Graphs without a cost are not known: what they do gives no figure.
    if tower is not None and min(tower.flops, tower.projector_flops) > 0:
        costs[tower.graph] = GraphCost("vision", per_tile=tower.flops)
        costs[tower.projector] = GraphCost("vision", per_token=tower.projector_flops)
    for segment in llm.segments:
        last = segment.first_layer + segment.layers >= llm.layers
        costs[segment.graph] = _decoder_cost("llm", llm, segment.layers, scores=not last)
    return costs


def _decoder_cost(stage: str, spec: DecoderSpec, layers: int, *, scores: bool) -> GraphCost:
    """Cost of some layers and what follows them: a scoring layer, or the output projection."""
    key, query = (2 * spec.hidden * n * spec.head_dim for n in (spec.kv_heads, spec.heads))
    return GraphCost(
        stage,
        per_token=layers * _layer_flops(spec) + (key if scores else 0),
        per_pair=layers * 4 * spec.heads * spec.head_dim,
        per_run=query if scores else 2 * spec.hidden * spec.vocabulary,
    )


def _with_attention(cost: GraphCost, spec: DecoderSpec) -> GraphCost:
    """The cost of an RFM that runs the whole attention of its scoring layer."""
    query, value = (2 * spec.hidden * n * spec.head_dim for n in (spec.heads, spec.kv_heads))
    return replace(
        cost,
        per_token=cost.per_token + query + value,
        per_pair=cost.per_pair + 4 * spec.heads * spec.head_dim,
        per_run=0,
    )


def count_flops(
    costs: Mapping[str, GraphCost] | None, work: Mapping[str, GraphWork]
) -> Flops | None:
    """Operations of what graphs have computed; None where a graph's cost is not known."""
    if costs is None or not work.keys() <= costs.keys():
        return None
    totals = {"vision": 0, "rfm": 0, "llm": 0}
    for graph, done in work.items():
        totals[costs[graph].stage] += costs[graph].of(done)
    return Flops(**totals)


def _layer_flops(spec: DecoderSpec) -> int:
    """One layer's matrix products for one token."""
    attention = 2 * spec.hidden * spec.head_dim * (spec.heads + spec.kv_heads)
    return 2 * (attention + 3 * spec.hidden * spec.intermediate)
