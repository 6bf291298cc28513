"""The loaded stages of one bundle: vision encoder, RFM, language model, and what is around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from lrs_edge.baselines.segments import SegmentedDecoder
from lrs_edge.baselines.tower import TowerEncoder
from lrs_edge.bundle.bundle import Bundle, Embeddings
from lrs_edge.bundle.manifest import DecoderSpec, Flavour, Manifest
from lrs_edge.engines.base import BackendOptions, Graph
from lrs_edge.engines.metered import Meter, MeteredGraph
from lrs_edge.errors import BackendError, BundleError, UsageError, out_of_memory
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.layout import SequenceBuilder
from lrs_edge.language.llm import LanguageModel
from lrs_edge.language.prompt import Prompt
from lrs_edge.requests.memory import means_no_memory
from lrs_edge.search.context import SearchModel
from lrs_edge.search.rfm import RegionFocus
from lrs_edge.vision.encoder import VisionEncoder


@dataclass(frozen=True)
class Stages:
    """The loaded stages of one bundle; `kv_cache` is the type of the LLM's key/value buffers."""

    manifest: Manifest
    prompt: Prompt
    sequences: SequenceBuilder
    embeddings: Embeddings
    vision: VisionEncoder
    focus: RegionFocus
    llm: LanguageModel
    search_model: SearchModel
    provider: str
    meter: Meter
    warnings: tuple[str, ...] = ()
    tower: TowerEncoder | None = None
    kv_cache: str = "float"


def unpacks_weights(precision: str) -> bool:
    """Whether a vision graph's weights are better dequantized once, when the graph is loaded.

    Not those of a graph that computes in int8: there the engine works on the integers.
    """
    return precision != "int8-static"


def runs_on_cuda(manifest: Manifest) -> bool:
    """Whether a bundle computes right on CUDA.

    GroupQueryAttention has CUDA kernels for float16 only. In float32 it falls to the CPU inside of
    a CUDA session, where bound key/value buffers are copied once instead of at every run: from the
    second chunk on the numbers are wrong, and nothing says so.
    """
    return all(spec.floats == "float16" for spec in (manifest.rfm, manifest.llm))


def load_stages(bundle: Bundle, options: BackendOptions, kv_cache: str = "float") -> Stages:
    """Load all stages of a bundle, all on the same provider.

    `auto` means whatever works. Bundles that do not compute right on CUDA (`runs_on_cuda`) run on
    the CPU; where CUDA is listed but a graph does not load on it, all graphs are loaded on the CPU,
    and every answer says so.

    Args:
        bundle: The bundle.
        options: How graphs are run.
        kv_cache: Type of the language model's key/value buffers, `float` or `int8`.

    Raises:
        BundleError: A graph, the tokenizer or the embeddings do not fit the manifest, or the
            bundle cannot run on the provider that was insisted on.
        BackendError: An engine cannot be loaded.
    """
    fits_cuda = runs_on_cuda(bundle.manifest)
    if options.provider == "cuda" and not fits_cuda:
        raise BundleError(
            f"{bundle.path} would answer wrongly on CUDA: its region focus module or language "
            "model computes in float32, for which ONNX Runtime's attention has no CUDA kernel. "
            "Use --provider cpu, or export the checkpoint for CUDA: lrs-edge export CHECKPOINT "
            "--target cuda -o BUNDLE"
        )
    if options.provider != "auto":
        return _load(bundle, options, kv_cache)
    if not fits_cuda:
        return _load(bundle, replace(options, provider="cpu"), kv_cache)
    try:
        return _load(bundle, options, kv_cache)
    except BackendError as error:
        stages = _load(bundle, replace(options, provider="cpu"), kv_cache)
        failed = f"running on the CPU because CUDA failed: {error}"
        return replace(stages, warnings=(failed, *stages.warnings))


def _llm_graph(spec: DecoderSpec, kv_cache: str) -> str:
    """The language model's graph for a type of key/value buffers. Raises UsageError."""
    if kv_cache == "float":
        return spec.path(Flavour.GQA)
    if not spec.has(Flavour.GQA_INT8_KV):
        raise UsageError(
            "this bundle has no language model over an int8 KV cache; export it with --int8-kv, or "
            "use --kv-cache float"
        )
    return spec.path(Flavour.GQA_INT8_KV)


def _load(bundle: Bundle, options: BackendOptions, kv_cache: str) -> Stages:
    manifest, meter = bundle.manifest, Meter()
    load_graph = partial(_graph, bundle, meter)
    hidden, vocabulary = manifest.llm.hidden, manifest.llm.vocabulary
    embeddings = Embeddings(
        bundle.file(manifest.embeddings), hidden, vocabulary, manifest.vision.positions
    )
    prompt = Prompt(bundle.file(manifest.tokenizer), manifest.prompt, vocabulary)
    sequences = SequenceBuilder(prompt, embeddings.lookup, embeddings.newline)
    vision_graph = load_graph(
        manifest.vision.path(Flavour.PLAIN),
        replace(options, unpack_weights=unpacks_weights(manifest.vision.precision)),
    )
    vision = VisionEncoder(vision_graph, manifest.vision, hidden, embeddings.positions)
    masked = manifest.rfm.path(Flavour.MASKED) if manifest.rfm.has(Flavour.MASKED) else None
    rfm = Decoder(
        load_graph(manifest.rfm.path(Flavour.GQA), options),
        manifest.rfm,
        scoring=True,
        load_masked=None if masked is None else partial(load_graph, masked, options),
    )
    llm_graph = load_graph(_llm_graph(manifest.llm, kv_cache), options)
    llm_decoder = Decoder(llm_graph, manifest.llm, scoring=False)
    focus = RegionFocus(rfm)
    return Stages(
        manifest=manifest,
        prompt=prompt,
        sequences=sequences,
        embeddings=embeddings,
        vision=vision,
        focus=focus,
        llm=LanguageModel(
            llm_decoder,
            prompt,
            embeddings,
            stop_ids=manifest.prompt.stop_ids,
            stop_texts=manifest.prompt.stop_texts,
            load_segments=partial(_segmented, manifest.llm, partial(load_graph, options=options))
            if manifest.llm.segments
            else None,
        ),
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
        ),
        provider=vision_graph.provider,
        meter=meter,
        tower=_tower(manifest, partial(load_graph, options=replace(options, unpack_weights=True))),
        kv_cache=kv_cache,
        warnings=_integer_warnings(manifest, vision_graph.provider),
    )


def _integer_warnings(manifest: Manifest, provider: str) -> tuple[str, ...]:
    """See `integer_check`, which needs the engine."""
    from lrs_edge.engines.integer_check import integer_warnings

    return integer_warnings(manifest, provider)


def _segmented(spec: DecoderSpec, load_graph: Callable[[str], Graph]) -> SegmentedDecoder:
    return SegmentedDecoder([load_graph(segment.graph) for segment in spec.segments], spec)


def _tower(manifest: Manifest, load_graph: Callable[[str], Graph]) -> TowerEncoder | None:
    spec = manifest.vision.tower
    if spec is None:
        return None
    names = spec.graph, spec.projector
    return TowerEncoder(
        lambda: (load_graph(names[0]), load_graph(names[1])), manifest.vision, manifest.llm.hidden
    )


def _graph(bundle: Bundle, meter: Meter, name: str, options: BackendOptions) -> Graph:
    try:
        from lrs_edge.engines.onnx import OnnxGraph
    except ImportError as error:
        if means_no_memory(error):
            raise out_of_memory("onnxruntime cannot be imported", error) from error
        raise BackendError(
            "onnxruntime is not installed; run, where lrs-edge was installed from: "
            "pip install '.[cpu]' (or '.[gpu]' on an NVIDIA GPU)"
        ) from error
    return MeteredGraph(OnnxGraph.load(bundle.graph(name), options), name, meter)
