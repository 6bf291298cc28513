"""Peak memory of this process."""

from __future__ import annotations

import sys


def peak_memory() -> int:
    """Largest resident memory of the process so far in bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
