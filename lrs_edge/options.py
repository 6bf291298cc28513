"""Options of one question, checked once, with the defaults in one place."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, SupportsIndex

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
        max_tiles: Most tiles looked at for one question, the global view and remembered tiles
            included; None for no limit.
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
        for name in ("max_tiles", "max_vision_tokens", "kv_budget"):
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
        UsageError: An option is unknown or cannot be meant.
    """
    if options is not None and not isinstance(options, AskOptions):
        raise UsageError(f"options is a {type(options).__name__}; give AskOptions")
    names = [field.name for field in fields(AskOptions)]
    for name in overrides:
        if name not in names:
            raise UsageError(f"there is no option {name!r}; the options are {', '.join(names)}")
    return replace(options or AskOptions(), **overrides)
