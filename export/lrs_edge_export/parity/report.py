"""What a parity check says: figures per stage, their limits, and how they were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrs_edge.errors import ExportError
from lrs_edge_export.quantization.precision import Precision

#: `whole`: the stage's graph, as the runtime runs it; the LLM's text is its own greedy choice.
#: `layer by layer`: its layers one at a time, on a given text (`parity.FORCED_TEXT`).
Mode = Literal["whole", "layer by layer"]


@dataclass(frozen=True)
class ParityRow:
    """One figure: `value` must be on the right side of `limit`, where `sign` is `<=` or `>=`."""

    stage: str
    measure: str
    value: float
    sign: str
    limit: float

    @property
    def shown(self) -> str:
        """The value as text; of a cosine or a share, the digits that tell it from 1."""
        return f"{self.value:.6g}" if self.sign == ">=" else f"{self.value:.3g}"

    @property
    def passed(self) -> bool:
        """False beyond the limit, and for a value that is no number."""
        return self.value <= self.limit if self.sign == "<=" else self.value >= self.limit

    @property
    def key(self) -> str:
        """Name in the manifest."""
        return f"{self.stage}_{self.measure}".replace(" ", "_")


@dataclass(frozen=True)
class StageParity:
    """A stage that was compared.

    Attributes:
        stage: `vision`, `rfm`, `llm`, or `llm-kv` (the LLM with int8 key and value buffers).
        precision: Of its weights.
        size: Bytes of its graph and weights.
        mode: How it was run.
    """

    stage: str
    precision: Precision
    size: int
    mode: Mode


@dataclass(frozen=True)
class ParityReport:
    """All figures, and what they were measured on."""

    images: str
    stages: tuple[StageParity, ...]
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """True if every figure is within its limit."""
        return all(row.passed for row in self.rows)

    def values(self) -> dict[str, float | int | str | bool]:
        """For the manifest: flat, stage and measure joined by an underscore.

        `llm_cosine` is a figure, `llm_cosine_limit` its limit; further `llm_precision`, `llm_bytes`
        and `llm_mode`.
        """
        found: dict[str, float | int | str | bool] = {"images": self.images, "passed": self.passed}
        for stage in self.stages:
            found |= {
                f"{stage.stage}_precision": stage.precision,
                f"{stage.stage}_bytes": stage.size,
                f"{stage.stage}_mode": stage.mode,
            }
            for row in self.rows:
                if row.stage == stage.stage:
                    found |= {row.key: row.value, f"{row.key}_limit": row.limit}
        return found

    def raise_if_failed(self) -> None:
        """Raise ExportError that names the figures beyond their limits."""
        failed = [
            f"{row.stage} {row.measure} {row.value:.3g} (must be {row.sign} {row.limit:g})"
            for row in self.rows
            if not row.passed
        ]
        if failed:
            raise ExportError(
                f"the parity check failed: {'; '.join(failed)}; use --precision fp32, or "
                "--no-parity to export all the same"
            )
