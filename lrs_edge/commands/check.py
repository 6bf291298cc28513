"""One finding of `lrs-edge doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: `ok`; `warn` where something is worse than it could be; `missing` where it is not
            there or does not work.
        detail: What was found.
        advice: What to do about it; empty where there is nothing to do.
        exit_code: Exit code of a problem that keeps `lrs-edge ask` from working, else 0.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""
    exit_code: int = 0
