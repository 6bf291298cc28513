"""Options of one question, checked once, with the defaults in one place."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, SupportsIndex, get_args

from lrs_edge.errors import UsageError

Policy = Literal["full", "reference"]
Resampling = Literal["area", "reference", "processor"]
SearchMode = Literal["pyramid", "exhaustive"]
Prune = Literal["rfm", "random", "norm", "none", "fastv", "pdrop", "visionzip", "prumerge"]

#: Ways to prune that score tokens before the language model; the others send all tokens to it.
SCORING: tuple[Prune, ...] = ("rfm", "random", "norm")
#: Ways to prune that drop tokens inside the language model.
INSIDE: tuple[Prune, ...] = ("fastv", "pdrop")
#: Ways to prune that choose and merge tokens of each tile by attention inside the vision tower.
TOWER: tuple[Prune, ...] = ("visionzip", "prumerge")


@dataclass(frozen=True)
class AskOptions:
    """How one question is answered.

    Attributes:
        policy: `full` searches to the original resolution; `reference` does what the authors'
            released code does, quirks included.
        resampling: `area` averages through overviews; `reference` is bilinear without
            antialiasing, as the authors do it; `processor` resizes as the image processor of the
            model's family does, on full-resolution pixels.
        max_tiles: Most tiles looked at for one question, the global view and remembered tiles
            included, shared over all levels; 0 and 1 leave the global view alone; None for no
            limit.
        tiles_per_level: Most tiles that `full` looks at in one level finer than the base.
        max_vision_tokens: Most vision tokens given to the language model; None for no limit.
        kv_budget: Most tokens left in the language model's KV cache after prefill; None for all.
        timeout: Seconds from submission, waiting for other questions included, until the answer is
            cut short; None for no limit. The search leaves time for an answer.
        max_tokens: Most tokens generated.
        temperature: 0 for greedy decoding.
        top_p: Nucleus of sampled decoding, above 0 and at most 1.
        seed: Of sampled decoding, and of random scores.
        end_str: Instruction put after the question on a line of its own (LRS-VQA's `end_str`).
        search: `pyramid` looks at the best tiles of each level; `exhaustive` at every tile of the
            finest one.
        prune: How vision tokens are chosen: by the scores of the RFM, or in another way
            (docs/pruning.md).
        prune_ratio: Share of the vision tokens that `fastv` and `pdrop` drop at each cut, and
            `visionzip` and `prumerge` in each tile; None for the papers' 1/2 and 8/9, and for the
            outliers that `prumerge` finds.
        prune_layers: Layers after which `fastv` (one) and `pdrop` cut; None for the bundle's first
            and for all of them.

    Raises:
        UsageError: A value is not valid.
    """

    policy: Policy = "full"
    resampling: Resampling = "area"
    max_tiles: int | None = None
    tiles_per_level: int = 16
    max_vision_tokens: int | None = None
    kv_budget: int | None = None
    timeout: float | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    end_str: str = ""
    search: SearchMode = "pyramid"
    prune: Prune = "rfm"
    prune_ratio: float | None = None
    prune_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("policy", Policy),
            ("search", SearchMode),
            ("prune", Prune),
            ("resampling", Resampling),
        ):
            _check_choice(name, getattr(self, name), get_args(known))
        if self.max_tiles is not None:
            _check_count("max_tiles", self.max_tiles, least=0)
        for name in ("max_vision_tokens", "kv_budget"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=1)
        for name in ("tiles_per_level", "max_tokens"):
            _check_count(name, getattr(self, name), least=1)
        _check_count("seed", self.seed, least=0)
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0):
            raise UsageError(f"timeout is {self.timeout!r}; it must be a number of seconds above 0")
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature!r}; it must be 0 or more")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        self._check_pruning()

    def _check_pruning(self) -> None:
        """Refuse what the policy, or the chosen way to prune or to search, cannot do."""
        if self.policy == "reference" and self.max_tiles is not None:
            raise UsageError("the reference policy has no tile budget; leave --max-tiles out")
        if self.policy == "reference" and (self.prune != "rfm" or self.search != "pyramid"):
            raise UsageError(
                "the reference policy does what the authors' code does: it has only --prune rfm "
                "and --search pyramid; use --policy full for the others"
            )
        if self.search == "exhaustive" and self.prune not in SCORING:
            raise UsageError(
                f"--search exhaustive chooses tokens by their scores, and --prune {self.prune} "
                f"has none; use --prune {', '.join(SCORING)}, or --search pyramid"
            )
        for name, users in (("prune_ratio", (*INSIDE, *TOWER)), ("prune_layers", INSIDE)):
            if getattr(self, name) is not None and self.prune not in users:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is for --prune {', '.join(users)} only")
        if self.prune in INSIDE and self.kv_budget is not None:
            raise UsageError(
                f"--kv-budget and --prune {self.prune} both prune the KV cache; use one of them"
            )
        if self.prune_ratio is not None and not (
            _is_number(self.prune_ratio) and 0 <= self.prune_ratio < 1
        ):
            raise UsageError(
                f"prune_ratio is {self.prune_ratio!r}; it must be at least 0 and below 1"
            )
        if self.prune_layers is not None:
            self._check_layers(self.prune_layers)

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        if not isinstance(layers, tuple) or not layers:
            raise UsageError(f"prune_layers is {layers!r}; give a tuple of layers, such as (2,)")
        for layer in layers:
            _check_count("prune_layers", layer, least=1)
        if list(layers) != sorted(set(layers)):
            raise UsageError(f"prune_layers is {layers!r}; the layers must ascend")
        if self.prune == "fastv" and len(layers) > 1:
            raise UsageError("fastv cuts once; name one layer, or use --prune pdrop")


def view_for(policy: Policy, view: Mapping[str, Any]) -> dict[str, Any]:
    """How an image is opened for questions of one policy.

    Args:
        policy: Of the questions. The authors' code does not turn photographs.
        view: What was asked for: `transparency`, `orientation`, `page` of `Engine.open`.
    """
    return {"orientation": "stored", **view} if policy == "reference" else dict(view)


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        listed = [repr(choice) for choice in known]
        text = f"{', '.join(listed[:-1])} or {listed[-1]}"
        raise UsageError(f"{name} {value!r} is unknown; use {text}")


def _check_count(name: str, value: object, *, least: int) -> None:
    whole = isinstance(value, SupportsIndex) and not isinstance(value, bool)
    if not whole or operator.index(value) < least:  # type: ignore[arg-type]
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def _is_number(value: object) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


def merged_options(options: AskOptions | None, overrides: Mapping[str, Any]) -> AskOptions:
    """Options with single values replaced.

    Raises:
        UsageError: An option is unknown, or its value is not valid.
    """
    if options is not None and not isinstance(options, AskOptions):
        raise UsageError(f"options is a {type(options).__name__}; give AskOptions")
    names = [field.name for field in fields(AskOptions)]
    for name in overrides:
        if name not in names:
            raise UsageError(f"there is no option {name!r}; the options are {', '.join(names)}")
    return replace(options or AskOptions(), **overrides)
