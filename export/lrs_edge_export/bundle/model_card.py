"""MODEL_CARD.md of a bundle, generated from its manifest."""

from __future__ import annotations

from collections.abc import Sequence

from lrs_edge.bundle.manifest import DecoderSpec, Manifest
from lrs_edge.bundle.parity import Accuracy, ParityReport

_MIB = 1 << 20


def model_card(manifest: Manifest, about: str) -> str:
    """Text of the card.

    Args:
        manifest: Of the bundle.
        about: The checkpoint's own card, taken over word for word; may be empty.
    """
    sections = [
        f"# {manifest.name}",
        "A bundle for lrs-edge, which answers questions about very large satellite and aerial "
        "images (method: arXiv 2503.07588).",
        _table(("", ""), _facts(manifest)),
        "## Stages",
        _table(("stage", "shape", "weights"), _stages(manifest)),
        "## Files",
        _table(
            ("file", "role", "MiB"),
            [
                (f"`{name}`", entry.role, f"{entry.size / _MIB:.2f}")
                for name, entry in manifest.files.items()
            ],
        ),
        "## Parity with PyTorch",
        _parity(manifest.parity),
        *_accuracy(manifest.parity.accuracy),
        "## Use",
        f'    lrs-edge ask image.tif "How many ships are there?" -m path/to/{manifest.name}',
        "Check the files with `lrs-edge models verify`. Nothing in a bundle is executable.",
    ]
    if about:
        sections += ["## The checkpoint's own card", about]
    return "\n\n".join(sections) + "\n"


def _facts(manifest: Manifest) -> list[tuple[str, ...]]:
    vision = manifest.vision
    return [
        ("family", manifest.family),
        ("licence of the weights", manifest.licence),
        ("source", f"{manifest.source.name} (SHA-256 `{manifest.source.sha256}`)"),
        ("exported", manifest.created),
        ("tile", f"{vision.tile} px, {vision.grid} x {vision.grid} tokens"),
        ("local tiles", f"{vision.per_tile} x {vision.per_tile} tokens"),
        ("base level", f"{manifest.search.base_side} px"),
        ("longest sequence", f"{manifest.limits.max_length} tokens"),
    ]


def _stages(manifest: Manifest) -> list[tuple[str, ...]]:
    rfm = manifest.rfm
    focus = ("none", "") if rfm is None else (f"{_decoder(rfm)} + scoring layer", rfm.precision)
    return [
        ("vision", f"tokens of width {manifest.llm.hidden}", manifest.vision.precision),
        ("region focus", *focus),
        ("language model", _decoder(manifest.llm), manifest.llm.precision),
    ]


def _decoder(spec: DecoderSpec) -> str:
    return (
        f"{spec.layers} layers, width {spec.hidden}, {spec.heads} heads "
        f"({spec.kv_heads} for keys and values)"
    )


def _parity(report: ParityReport) -> str:
    if report.images is None:
        return "The check was skipped (`--no-parity`)."
    stages = [
        (one.stage, str(one.precision), f"{(one.bytes or 0) / _MIB:.2f}", str(one.mode))
        for one in report.stages
    ]
    rows = [
        (stage.stage, figure.measure, figure.shown, f"{figure.sign} {figure.limit:g}")
        for stage in report.stages
        for figure in stage.figures
    ]
    parts = [
        f"On {report.images}, none of them used to calibrate.",
        _table(("stage", "precision", "MiB", "compared"), stages),
        _table(("stage", "measure", "value", "limit"), rows),
    ]
    return "\n\n".join(parts)


def _accuracy(found: Accuracy | None) -> list[str]:
    """The section on answers, where any were counted."""
    if found is None:
        return []
    text = (
        f"{found.correct} of {found.total} questions of {found.dataset} answered right "
        f"(`lrs-edge eval`, {found.matching})"
    )
    if found.baseline_correct is not None:
        text += f"; {found.baseline_correct} before quantization"
    return ["## Accuracy", f"{text}."]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
