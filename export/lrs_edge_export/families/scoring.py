"""Which layer of a language model scores tokens, where no region focus module was trained."""

from __future__ import annotations

from dataclasses import dataclass

#: What a token's attention may be divided by: the instruction of the work that does so (Zhang et
#: al., arXiv 2502.17422).
GENERIC = "Write a general description of the image."


@dataclass(frozen=True)
class ScoringLayer:
    """A layer that was found to look at what a question is about, as a share of the depth.

    `lrs-edge distill --measure` finds the layer of a checkpoint itself.

    Attributes:
        layer: Its number, from 0; so many layers are before it.
        of: Layers of the language model in which it was found.
        source: Where that is written.
    """

    layer: int
    of: int
    source: str

    def before(self, layers: int) -> int:
        """Layers before the scoring layer in a language model of so many."""
        return max(min(round(self.layer * layers / self.of), layers - 1), 1)


#: The authors of that work say of it that other layers may be worth a try.
QWEN2_5_VL = ScoringLayer(22, 36, "layer 22 of the 36 of Qwen2.5-VL-3B, code of arXiv 2502.17422")

#: Of models that were trained as LLaVA was, and of families that nobody has measured.
LLAVA = ScoringLayer(14, 32, "layer 14 of the 32 of LLaVA-1.5-7B, arXiv 2502.17422")
