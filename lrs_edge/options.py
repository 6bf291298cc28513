"""Options of one question, checked once, with the defaults in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lrs_edge.errors import UsageError

Policy = Literal["full", "reference"]
Resampling = Literal["area", "reference"]


@dataclass(frozen=True)
class AskOptions:
    """How one question is answered.

    Attributes:
        policy: `full` searches to the original resolution; `reference` does what the authors'
            released code does, quirks included.
        resampling: `area` averages through overviews; `reference` is bilinear without
            antialiasing, as the authors do it.
        max_tiles: Most tiles encoded for one question, the global view included; None for no limit.
        tiles_per_level: Most tiles that `full` looks at in one level finer than the base.
        max_vision_tokens: Most vision tokens given to the language model; None for no limit.
        kv_budget: Most tokens left in the language model's KV cache after prefill; None for all.
        timeout: Seconds until the answer is cut short; None for no limit.
        max_tokens: Most tokens generated.
        temperature: 0 for greedy decoding.
        top_p: Nucleus of sampled decoding, above 0 and at most 1.
        seed: Of sampled decoding.
        end_str: Instruction put after the question on a line of its own (LRS-VQA's `end_str`).

    Raises:
        UsageError: A value that cannot be meant.
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

    def __post_init__(self) -> None:
        if self.policy not in ("full", "reference"):
            raise UsageError(f"policy {self.policy!r} is unknown; use 'full' or 'reference'")
        if self.resampling not in ("area", "reference"):
            raise UsageError(
                f"resampling {self.resampling!r} is unknown; use 'area' or 'reference'"
            )
        counts = ("max_tiles", "tiles_per_level", "max_vision_tokens", "kv_budget", "max_tokens")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UsageError(f"timeout is {self.timeout!r}; it must be a number of seconds above 0")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature!r}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed!r}; it must be 0 or more")


def merged_options(options: AskOptions | None, overrides: Mapping[str, Any]) -> AskOptions:
    """Options with single values replaced.

    Raises:
        UsageError: An option is unknown or cannot be meant.
    """
    names = [field.name for field in fields(AskOptions)]
    for name in overrides:
        if name not in names:
            raise UsageError(f"there is no option {name!r}; the options are {', '.join(names)}")
    return replace(options or AskOptions(), **overrides)
