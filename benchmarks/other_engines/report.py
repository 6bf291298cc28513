"""Tables of the comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.other_engines.process import Contender


def table(
    group: str,
    contenders: Sequence[Contender],
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    prefill: int,
    steps: int,
) -> str:
    """One precision as a table in Markdown.

    Args:
        group: Precision.
        contenders: All engines at it.
        runs: Measured runs by contender.
        prefill: Tokens of the prompt.
        steps: Decoding steps.

    Returns:
        Medians of tokens per second with the range over rounds, peak memory of the process, and
        size on disk; below, for each of ours, its median over that of the better other engine.
    """
    lines = [
        f"| {group} | prefill {prefill}, tokens/s | decode {steps}, tokens/s "
        "| peak MiB | file MiB |",
        "|---|---|---|---|---|",
    ]
    rates: dict[str, tuple[float, float]] = {}
    for contender in contenders:
        mine = runs[contender.name]
        fast = [prefill / run["prefill_s"] for run in mine]
        slow = [steps / run["decode_s"] for run in mine]
        rates[contender.name] = statistics.median(fast), statistics.median(slow)
        peak = max(run["peak_mib"] for run in mine)
        lines.append(
            f"| {contender.name} | {_spread(fast)} | {_spread(slow)} | {peak:.0f} | "
            f"{contender.file_mib:.0f} |"
        )
    others = [rates[c.name] for c in contenders if c.engine != "ours"]
    lines.append("")
    for contender in contenders:
        if contender.engine == "ours" and others:
            ours = rates[contender.name]
            ratios = [ours[part] / max(other[part] for other in others) for part in (0, 1)]
            lines.append(
                f"{contender.name} against the better of the others: prefill {ratios[0]:.2f}, "
                f"decode {ratios[1]:.2f}"
            )
    return "\n".join([*lines, ""])


def _spread(rates: Sequence[float]) -> str:
    """Median, with lowest and highest."""
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
