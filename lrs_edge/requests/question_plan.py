"""What one question needs of the model and of the image, checked when it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from lrs_edge.baselines.inside import PruningPlan, plan_pruning
from lrs_edge.baselines.prumerge import PruMerge
from lrs_edge.baselines.tower import CompressedTiles, Rule
from lrs_edge.baselines.visionzip import DROPPED, VisionZip
from lrs_edge.bundle.layout import LocalRows
from lrs_edge.errors import BundleError, UsageError
from lrs_edge.pyramid.levels import Pyramid, build_pyramid, reference_fails
from lrs_edge.requests.budget import ModelCosts
from lrs_edge.requests.clock import Clock
from lrs_edge.requests.options import INSIDE, TOWER, AskOptions, Prune, merged_options
from lrs_edge.stages import Stages

if TYPE_CHECKING:
    from lrs_edge.raster.raster import Raster


@dataclass(frozen=True)
class QuestionPlan:
    """How a question will be answered.

    Attributes:
        options: As asked for, or with the policy that the image allows.
        pyramid: Of the image, under that policy.
        pruning: Where tokens are dropped inside the language model, or None.
        warnings: One sentence each.
    """

    options: AskOptions
    pyramid: Pyramid
    pruning: PruningPlan | None
    warnings: tuple[str, ...]


def plan_question(stages: Stages, raster: Raster, options: AskOptions) -> QuestionPlan:
    """Check that the bundle can do what the options ask for, and lay out the image.

    Raises:
        UsageError: It cannot, with these options.
        BundleError: It cannot, as it was exported.
    """
    warnings = []
    if options.policy == "reference" and raster.info.orientation != 1:
        warnings.append(
            "the image was turned by its EXIF orientation, which the authors' code does not "
            "do; open it with orientation 'stored' for the reference policy"
        )
    _check_layout(stages, options)
    chosen = _available_pruning(stages, options)
    if chosen is not None:
        options, warning = chosen
        warnings.append(warning)
    pruning = _plan_pruning(stages, options)
    manifest = stages.manifest
    build = partial(
        build_pyramid,
        raster.height,
        raster.width,
        tile=manifest.vision.tile,
        base_side=manifest.search.base_side,
        stretched=manifest.vision.stretched,
    )
    pyramid = build(policy=options.policy)
    if options.policy == "reference" and reference_fails(pyramid, stages.vision.per_tile):
        options = merged_options(options, {"policy": "full"})
        warnings.append(
            "the reference implementation fails on images of this shape; answered with the "
            "full policy"
        )
        pyramid = build(policy="full")
    _check_tower(stages, options)
    return QuestionPlan(options, pyramid, pruning, tuple(warnings))


def _check_layout(stages: Stages, options: AskOptions) -> None:
    if options.policy != "reference":
        return
    if stages.manifest.prompt.local != LocalRows(newline=True):
        raise BundleError(
            "the reference policy is for models whose local tokens stand in rows that end with "
            "newlines, which this bundle's prompt does not have; use --policy full"
        )


def _available_pruning(stages: Stages, options: AskOptions) -> tuple[AskOptions, str] | None:
    """Options with another way to prune where the bundle has no RFM, and what to say of it."""
    if options.prune != "rfm" or stages.focus is not None:
        return None
    missing = "this bundle has no region focus module"
    wanted = "a checkpoint exported with --rfm from-llm has one without training"
    if options.policy == "reference":
        raise BundleError(f"{missing}, which the reference policy needs; {wanted}")
    prune: Prune = "none"
    if options.search == "exhaustive":
        prune = "norm"
    elif stages.manifest.llm.segments and stages.kv_cache == "float" and not options.kv_budget:
        prune = "fastv"
    warning = (
        f"{missing}, so --prune {prune} was used: it does not search for what was asked about; "
        f"{wanted}"
    )
    return merged_options(options, {"prune": prune}), warning


def _plan_pruning(stages: Stages, options: AskOptions) -> PruningPlan | None:
    if options.prune not in INSIDE:
        return None
    if stages.kv_cache != "float":
        raise UsageError(
            f"--prune {options.prune} drops tokens between layers of the language model, "
            "which has no int8 KV cache for that; use --kv-cache float"
        )
    return plan_pruning(options, stages.manifest.llm.segments)


def _check_tower(stages: Stages, options: AskOptions) -> None:
    if options.prune in TOWER and stages.tower is None:
        raise BundleError(
            f"--prune {options.prune} chooses tokens by attention inside a CLIP vision "
            "tower, for which this bundle has no outputs; export one with such a tower and "
            "--vision-attention"
        )


def compressed_tiles(
    stages: Stages,
    raster: Raster,
    options: AskOptions,
    clock: Clock,
    on_tile: Callable[[Literal["read", "encode"], int, int], None],
) -> CompressedTiles | None:
    """Tiles whose tokens are chosen inside the vision tower, where the options ask for that.

    Args:
        stages: The model.
        raster: The image.
        options: Of the question.
        clock: Measures reading and encoding.
        on_tile: Told about every tile.
    """
    if options.prune not in TOWER or stages.tower is None:
        return None
    ratio = options.prune_ratio
    rule: Rule = VisionZip(DROPPED if ratio is None else ratio)
    if options.prune == "prumerge":
        rule = PruMerge(ratio)
    return CompressedTiles(
        stages.tower, stages.vision, raster, rule, options.resampling, clock, on_tile
    )


def model_costs(stages: Stages) -> ModelCosts:
    """What a budget has to know of the model to foresee how long its steps take."""
    manifest = stages.manifest
    return ModelCosts(
        vision=stages.vision.graph_name,
        rfm="" if stages.focus is None else stages.focus.graph_name,
        llm=stages.llm.graph_name,
        rfm_share=(manifest.rfm.layers if manifest.rfm else 0) / max(manifest.llm.layers, 1),
        per_tile=stages.vision.per_tile**2,
        keep_ratio=stages.search_model.keep_ratio,
    )
