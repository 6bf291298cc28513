"""A whole benchmark: the chosen stages, then the machine's peaks, then the floors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from lrs_edge.benchmarking.engines import EngineBench
from lrs_edge.benchmarking.floor import Peaks
from lrs_edge.benchmarking.loading import measure_load
from lrs_edge.benchmarking.machine import cpu_name, gpu_name
from lrs_edge.benchmarking.measure import Measurement
from lrs_edge.benchmarking.peaks import MEASURED, measure_peaks
from lrs_edge.benchmarking.reading import measure_read
from lrs_edge.benchmarking.synthetic import synthetic_side, write_image_apart
from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.bundle.manifest import Manifest
from lrs_edge.bundle.parity import StageParity
from lrs_edge.engines.devices import backend_options
from lrs_edge.errors import UsageError
from lrs_edge.evaluation.flops import graph_costs
from lrs_edge.stages import load_stages

#: All stages, in the order in which they run.
STAGES = ("load", "read", "encode", "rfm", "prefill", "decode")
_ENGINES = frozenset(STAGES[2:])

Tell = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        stages: Some of `STAGES`.
        prompts: Lengths of prompts in tokens.
        generated: Tokens decoded.
        depths: Tokens in the KV cache before those.
        tiles: Tiles read, encoded, and in a level of the RFM.
        repetitions: How often each stage runs.
        warmup: Whether each stage runs once untimed before.
        image: Image to read tiles from; None for a synthetic one.
        device: See `lrs_edge.load`, as the next three.
        threads: Threads of one operation.
        kv_cache: Type of the language model's KV cache: `float` or `int8`.
        verify: False skips the hashes of large files.
        peak_seconds: Time for measuring each of the machine's peaks.
    """

    stages: tuple[str, ...] = STAGES
    prompts: tuple[int, ...] = (512,)
    generated: tuple[int, ...] = (64,)
    depths: tuple[int, ...] = (512,)
    tiles: int = 16
    repetitions: int = 5
    warmup: bool = True
    image: Path | None = None
    device: str = "auto"
    threads: int | None = None
    kv_cache: str = "float"
    verify: bool = True
    peak_seconds: float = 0.5


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and where.

    Attributes:
        facts: Bundle, versions, machine, conditions: what a reader must know, by name.
        peaks: The machine's.
        measurements: One per stage and parameter.
        accuracy: How far each stage is from the checkpoint, as the bundle's exporter measured it on
            a CPU.
    """

    facts: dict[str, str]
    peaks: Peaks
    measurements: tuple[Measurement, ...]
    accuracy: tuple[StageParity, ...] = ()


def run_bench(path: Path | None, options: BenchOptions, tell: Tell) -> Benchmark:
    """Measure a bundle.

    Args:
        path: The bundle's directory; None for the embedded model.
        options: What is measured.
        tell: Told about every step.

    Raises:
        BundleError: The bundle is not as its manifest says.
        BackendError: An engine cannot be loaded or fails.
        ImageError: The image cannot be read.
        UsageError: A number of tokens that the model does not take.
    """
    tell("checking the bundle")
    bundle = open_bundle(path, verify=options.verify)
    _check_lengths(bundle.manifest, options)
    measured: list[Measurement] = []
    with ExitStack() as stack:
        facts = _facts(bundle, options)
        if "load" in options.stages:
            tell("load: fresh processes")
            measured.append(
                measure_load(
                    bundle,
                    device=options.device,
                    threads=options.threads,
                    kv_cache=options.kv_cache,
                    verify=options.verify,
                    repetitions=options.repetitions,
                    warmup=options.warmup,
                )
            )
        if "read" in options.stages:
            image = options.image
            if image is None:
                image = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "synthetic.tif"
                side = synthetic_side(bundle.manifest, options.tiles)
                tell(f"read: writing a synthetic image of {side} x {side} pixels")
                write_image_apart(image, side)
                facts["image"] = (
                    f"synthetic, {side} x {side} pixels, GeoTIFF in tiles of 256, deflate, "
                    "overviews"
                )
            tell("read")
            measured += measure_read(
                image,
                bundle.manifest,
                options.tiles,
                options.repetitions,
                warmup=options.warmup,
            )
    provider = "cpu"
    if _ENGINES & set(options.stages):
        tell("loading the engines")
        stages = load_stages(
            bundle, backend_options(options.device, options.threads), options.kv_cache
        )
        provider = stages.provider
        warnings = list(stages.warnings)
        if graph_costs(bundle.manifest) is None:
            warnings.append(
                "no floors: the bundle was exported before operations were counted; export it again"
            )
        if provider not in MEASURED:
            warnings.append(f"no floors: peaks are measured of {' or '.join(MEASURED)} alone")
        facts["warnings"] = "; ".join(warnings)
        bench = EngineBench(bundle, stages, options.repetitions, warmup=options.warmup)
        measured += _run_engines(bench, options, tell)
        # The peaks need memory of their own.
        del bench, stages
        facts["provider"] = provider
    if provider != "cpu":
        facts["gpu"] = gpu_name()
    tell("measuring the machine's peaks")
    works = [measurement.work for measurement in measured if measurement.work is not None]
    peaks = Peaks({}, {})
    if provider in MEASURED:
        peaks = measure_peaks(
            provider,
            options.threads,
            [kind for work in works for kind in work.arithmetic],
            [work.working_set for work in works],
            seconds=options.peak_seconds,
        )
    shown = {name: text for name, text in facts.items() if text}
    return Benchmark(shown, peaks, tuple(measured), tuple(bundle.manifest.parity.stages))


def _check_lengths(manifest: Manifest, options: BenchOptions) -> None:
    """Refuse more tokens than the model takes, before anything is measured."""
    wanted: dict[str, int] = {}
    if "prefill" in options.stages:
        wanted["--n-prompt"] = max(options.prompts)
    if "decode" in options.stages:
        wanted["--n-depth and --n-gen together"] = max(options.depths) + max(options.generated)
    for option, length in wanted.items():
        if length > manifest.limits.max_length:
            raise UsageError(
                f"{option}: {length} tokens are more than the {manifest.limits.max_length} that "
                "this model takes; give fewer"
            )


def _run_engines(bench: EngineBench, options: BenchOptions, tell: Tell) -> Iterator[Measurement]:
    if "encode" in options.stages:
        tell("encode")
        yield bench.encode(options.tiles)
    if "rfm" in options.stages:
        tell("rfm")
        yield from bench.rfm(options.tiles)
    if "prefill" in options.stages:
        for length in options.prompts:
            tell(f"prefill of {length} tokens")
            yield bench.prefill(length)
    if "decode" in options.stages:
        for depth in options.depths:
            for count in options.generated:
                tell(f"decode of {count} tokens after {depth}")
                yield bench.decode(count, depth)


def _facts(bundle: Bundle, options: BenchOptions) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "bundle": manifest.name,
        "precisions": f"vision {manifest.vision.precision}, "
        f"rfm {manifest.rfm.precision if manifest.rfm else 'none'}, "
        f"llm {manifest.llm.precision}",
        "lrs-edge": _version("lrs-edge"),
        "onnxruntime": _onnxruntime(),
        "cpu": cpu_name(),
        "threads": "chosen by the engine" if options.threads is None else str(options.threads),
        "kv cache": options.kv_cache,
        "provider": "",
        "gpu": "",
        "image": "" if options.image is None else str(options.image),
        "repetitions": f"{options.repetitions}, {'after' if options.warmup else 'without'} a "
        "warm-up",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "warnings": "",
    }


def _onnxruntime() -> str:
    from lrs_edge.engines.runtime import ort

    return str(ort.__version__)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "from a checkout"
