"""Kinds of RoPE: what becomes of the frequencies of a model that was made for longer sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

#: Kinds by the names that configs have. `dynamic` is left out: up to the length that the model was
#: made for, which the runtime does not pass, it changes nothing.
Kind = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeScaling:
    """A change of RoPE's frequencies.

    Attributes:
        kind: `linear` slows all down, `llama3` and `yarn` slow ones only.
        factor: How many times slower.
        original: Length in tokens that the model was first trained on; not of `linear`.
        low: Turns over that length below which a frequency is slow; not of `linear`.
        high: Turns above which it is fast, and stays; those between are mixed.
        gain: What cosine and sine are multiplied by.
        whole: The bounds of `yarn` are rounded outwards to whole frequencies.
    """

    kind: Kind
    factor: float
    original: int = 1
    low: float = 1.0
    high: float = 4.0
    gain: float = 1.0
    whole: bool = True

    def applied(self, frequencies: Tensor, theta: float) -> Tensor:
        """Inverse frequencies float32 [d / 2] for those of RoPE's base theta.

        In the order of operations that transformers has: at large positions bits matter.
        """
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":
            return self._llama3(frequencies)
        return self._yarn(frequencies, theta)

    def _llama3(self, frequencies: Tensor) -> Tensor:
        import torch

        lengths = 2 * math.pi / frequencies
        slow, fast = lengths > self.original / self.low, lengths < self.original / self.high
        share = (self.original / lengths - self.low) / (self.high - self.low)
        mixed = (1 - share) * frequencies / self.factor + share * frequencies
        found = torch.where(slow, frequencies / self.factor, frequencies)
        return torch.where(~slow & ~fast, mixed, found)

    def _yarn(self, frequencies: Tensor, theta: float) -> Tensor:
        import torch

        count = len(frequencies)
        first, last = (self._place(turns, 2 * count, theta) for turns in (self.high, self.low))
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        places = torch.arange(count, dtype=torch.float32, device=frequencies.device)
        # The last place is moved where both are one, so that nothing is divided by zero.
        ramp = (places - first) / ((last if last != first else last + 0.001) - first)
        kept = 1 - ramp.clamp(0, 1)
        slow = 1.0 / (self.factor * (1.0 / frequencies))
        return slow * (1 - kept) + frequencies * kept

    def _place(self, turns: float, width: int, theta: float) -> float:
        """Which of the frequencies turns so often over the original length."""
        return width * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
