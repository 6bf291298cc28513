"""The loaded stages of one bundle: vision encoder, RFM, language model, and what is around them.

Where they run is decided in `engines/placement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lrs_edge.baselines.segments import SegmentedDecoder
from lrs_edge.baselines.tower import TowerEncoder
from lrs_edge.bundle.bundle import Bundle, Embeddings
from lrs_edge.bundle.manifest import ONNXRUNTIME, DecoderSpec, Flavour, Manifest
from lrs_edge.engines.base import BackendOptions, Graph
from lrs_edge.engines.devices import StagePlace
from lrs_edge.engines.metered import Meter
from lrs_edge.engines.placement import GraphLoader, Placement, placements
from lrs_edge.engines.rows import Rows, newline_sources, text_sources
from lrs_edge.errors import BackendError, BundleError, QuestionError, UsageError
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.llm import LanguageModel
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.yes_no import YesNo, yes_no_tokens
from lrs_edge.search.context import SearchModel
from lrs_edge.search.rfm import RegionFocus
from lrs_edge.vision.encoder import VisionEncoder
from lrs_edge.vision.on_device import DeviceTiles


@dataclass(frozen=True)
class Stages:
    """The loaded stages of one bundle.

    `provider` says on which device they run, `kv_cache` of which type the LLM's key/value buffers
    are; `yes_no` are the tokens of yes and no, those of the calibration where there is one;
    `places` says where every stage runs, with the nodes of the graphs that are loaded by then.
    """

    manifest: Manifest
    prompt: Prompt
    sequences: SequenceBuilder
    embeddings: Embeddings
    vision: VisionEncoder
    focus: RegionFocus | None
    llm: LanguageModel
    search_model: SearchModel
    provider: str
    meter: Meter
    yes_no: YesNo
    warnings: tuple[str, ...] = ()
    tower: TowerEncoder | None = None
    kv_cache: str = "float"
    places: Callable[[], tuple[StagePlace, ...]] = tuple


def load_stages(bundle: Bundle, options: BackendOptions, kv_cache: str = "float") -> Stages:
    """Load all stages of a bundle.

    `auto` means whatever works: where a graph does not load on CUDA, what nobody placed is loaded
    on the CPU, and every answer says so.

    Args:
        bundle: The bundle.
        options: Where stages run, and how.
        kv_cache: Type of the language model's key/value buffers, `float` or `int8`.

    Raises:
        BundleError: A graph, the tokenizer or the embeddings do not fit the manifest, or the
            bundle cannot run where it was asked to.
        BackendError: An engine cannot be loaded.
        UsageError: What was asked for is not there.
    """
    first, *others = placements(bundle, options)
    soon = _soon_loaded(bundle.manifest)
    try:
        with bundle.checking_ahead(soon):
            return _load(bundle, first, options, kv_cache)
    except BackendError as error:
        for placement in others:
            stages = _load(bundle, placement, options, kv_cache)
            failed = f"auto runs this on {placement} because {first} failed: {error}"
            return replace(stages, warnings=(failed, *stages.warnings))
        raise


def _soon_loaded(manifest: Manifest) -> list[str]:
    """Graphs of the decoders that are loaded with the bundle."""
    shared = manifest.llm.has(Flavour.GQA_REST)
    found = []
    for spec in manifest.decoders:
        wanted = Flavour.GQA_REST if shared and spec is manifest.llm else Flavour.GQA
        found += [file.path for file in spec.graphs if file.flavour == wanted]
    return found


def _load(bundle: Bundle, placement: Placement, options: BackendOptions, kv_cache: str) -> Stages:
    manifest, meter = bundle.manifest, Meter()
    graphs = GraphLoader(bundle, placement, options, meter)
    hidden, vocabulary = manifest.llm.hidden, manifest.llm.vocabulary
    embeddings = Embeddings(
        bundle.file(manifest.embeddings),
        hidden,
        vocabulary,
        manifest.vision.positions,
        manifest.llm.width,
    )
    prompt = Prompt(bundle.file(manifest.tokenizer), manifest.prompt, vocabulary)
    if manifest.vision.objects is not None:
        prompt.check_labels(manifest.vision.objects.labels)
    sequences = SequenceBuilder(
        prompt,
        lambda ids: Rows.of(embeddings.lookup(ids), text_sources(ids)),
        Rows.of(embeddings.newline[None], newline_sources()),
        manifest.vision.grid**2,
    )
    seeing = graphs.stage("vision")
    axes = manifest.prompt.position_axes
    shares = kv_cache == "float" and graphs.shares_layers()
    scoring, answering = graphs.joined() if shares else (None, _llm_graph(graphs, kv_cache))
    llm = LanguageModel(
        Decoder(
            answering,
            manifest.llm,
            scoring=False,
            axes=axes,
            longest=manifest.limits.max_length,
        ),
        prompt,
        embeddings,
        stop_ids=manifest.prompt.stop_ids,
        stop_texts=manifest.prompt.stop_texts,
        load_segments=(lambda: _segmented(manifest, graphs)) if manifest.llm.segments else None,
    )
    focus = None
    if manifest.rfm is not None:
        scoring = scoring or graphs.stage("rfm")
        decoder = _scoring_decoder(manifest.rfm, graphs, scoring, axes)
        focus = RegionFocus(decoder, llm if shares else None)
    vision = _vision(manifest, embeddings, seeing, answering, scoring)
    return Stages(
        manifest=manifest,
        prompt=prompt,
        sequences=sequences,
        embeddings=embeddings,
        vision=vision,
        focus=focus,
        llm=llm,
        search_model=SearchModel(
            focus=focus,
            sequences=sequences,
            per_tile=vision.per_tile,
            tile=manifest.vision.tile,
            base_side=manifest.search.base_side,
            keep_ratio=manifest.search.keep_ratio,
            max_length=manifest.limits.max_length,
            max_positions=manifest.limits.max_positions,
            gapless=manifest.vision.positions > 0,
            generic=_generic(manifest, prompt),
        ),
        provider=str(placement),
        meter=meter,
        yes_no=_yes_no(manifest, prompt),
        tower=_tower(manifest, graphs),
        kv_cache=kv_cache,
        places=graphs.places,
        warnings=(
            *placement.notes,
            *_untold(graphs.places()),
            *_integer_warnings(manifest, placement),
        ),
    )


def _vision(
    manifest: Manifest, embeddings: Embeddings, graph: Graph, llm: Graph, rfm: Graph | None
) -> VisionEncoder:
    """The vision stage; its tokens stay on its device where all that takes them runs there."""
    positions, around = embeddings.positions, None
    elsewhere = {other.device for other in (llm, rfm) if other is not None} - {graph.device}
    if graph.device != "cpu" and not elsewhere:
        half = manifest.llm.floats == "float16"
        around = DeviceTiles(graph, manifest.vision, positions, half=half)
        # Some engines run small graphs on the host: there, tokens had better come down at once.
        around = around if around.device == graph.device else None
    return VisionEncoder(graph, manifest.vision, manifest.llm.width, positions, around)


def _generic(manifest: Manifest, prompt: Prompt) -> NDArray[np.int64] | None:
    """Token ids of the instruction that scores are relative to. Raises BundleError."""
    text = manifest.search.relative_to
    if not text:
        return None
    try:
        return prompt.tokens(text).after
    except QuestionError as error:
        raise BundleError(
            f"search.relative_to of the bundle cannot be asked ({error}); export it again"
        ) from error


def _scoring_decoder(spec: DecoderSpec, graphs: GraphLoader, graph: Graph, axes: int) -> Decoder:
    masked = graphs.path("rfm", "masked") is not None
    return Decoder(
        graph,
        spec,
        scoring=True,
        axes=axes,
        load_masked=(lambda: graphs.stage("rfm", "masked")) if masked else None,
    )


def _llm_graph(graphs: GraphLoader, kv_cache: str) -> Graph:
    """The language model over a type of key/value buffers. Raises UsageError."""
    if kv_cache == "float":
        return graphs.stage("llm")
    if graphs.path("llm", "int8-kv") is None:
        raise UsageError(
            "this bundle has no language model over an int8 KV cache; export it with --int8-kv, or "
            "use --kv-cache float"
        )
    return graphs.stage("llm", "int8-kv")


def _untold(places: Sequence[StagePlace]) -> tuple[str, ...]:
    """A warning where a part of a stage may run on the CPU and nobody can tell."""
    stages = [
        place.stage
        for place in places
        if place.engine == ONNXRUNTIME and place.device != "cpu" and not place.nodes
    ]
    if not stages:
        return ()
    return (
        f"this onnxruntime does not tell where the nodes of {', '.join(stages)} run, so a part may "
        "run on the CPU; version 1.24 and newer tell",
    )


def _integer_warnings(manifest: Manifest, placement: Placement) -> tuple[str, ...]:
    """See `integer_check`, which needs the engine."""
    from lrs_edge.engines.integer_check import integer_warnings

    return integer_warnings(manifest, placement.on("cpu"))


def _yes_no(manifest: Manifest, prompt: Prompt) -> YesNo:
    fitted = None if manifest.calibration is None else manifest.calibration.yes_no
    return yes_no_tokens(prompt) if fitted is None else YesNo(fitted.yes_ids, fitted.no_ids)


def _segmented(manifest: Manifest, graphs: GraphLoader) -> SegmentedDecoder:
    parts = [graphs.file("llm", segment.graph) for segment in manifest.llm.segments]
    return SegmentedDecoder(parts, manifest.llm, manifest.prompt.position_axes)


def _tower(manifest: Manifest, graphs: GraphLoader) -> TowerEncoder | None:
    spec = manifest.vision.tower
    if spec is None:
        return None
    names = spec.graph, spec.projector

    def load() -> tuple[Graph, Graph]:
        tower, projector = (graphs.file("vision", name, unpack_weights=True) for name in names)
        return tower, projector

    return TowerEncoder(load, manifest.vision, manifest.llm.hidden)
