"""Peak memory and time of `lrs-edge ask` on images of growing size.

Writes tiled GeoTIFFs of 1,000 to 27,328 pixels, with and without overviews, into a temporary
directory, and asks the same question about each in a fresh process. Peak memory is the process's
own `VmHWM` (what `wait4` reports is inherited from this script) and must not grow with the image;
time grows with the number of levels.

    python -m benchmarks.ask_memory [--sides 1000 4096 27328] [--bundle DIR]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import head, parser_for, write_image

QUESTION = "What kind of place is this?"


def ask(image: Path, bundle: str | None) -> dict[str, float]:
    """Run one question; figures of the process from outside, and of the answer."""
    command = [sys.executable, "-m", "lrs_edge.commands.main", "ask", str(image), QUESTION]
    command += ["--format", "json", "-q"] + ([] if bundle is None else ["-m", bundle])
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"{image.name}: exit code {done.returncode}: {done.stderr}")
    answer = json.loads(done.stdout)
    return {
        "peak_mib": answer["peak_memory_bytes"] / 2**20,
        "seconds": seconds,
        "levels": len(answer["levels"]),
        "tiles": len(answer["regions"]) + 1,
        "read": answer["timings"]["read"],
        "sent": answer["tokens"]["sent"],
    }


def main() -> None:
    """Write the images, ask, print a table and one line of JSON."""
    parser = parser_for(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[1000, 4096, 8192, 27328])
    parser.add_argument("--bundle", help="default: the embedded model")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    titles = "side", "file", "levels", "tiles", "vision tokens", "s", "of which reading", "peak MiB"
    print(head(titles))
    with tempfile.TemporaryDirectory() as folder:
        for side in options.sides:
            for overviews in (True, False):
                path = Path(folder) / f"{side}.tif"
                write_image(path, side, overviews=overviews)
                figures = ask(path, options.bundle)
                path.unlink()
                kind = "overviews" if overviews else "plain"
                rows.append({"side": side, "file": kind, **figures})
                print(
                    f"| {side:,} | {kind} | {figures['levels']} | {figures['tiles']} | "
                    f"{figures['sent']} | {figures['seconds']:.1f} | {figures['read']:.1f} | "
                    f"{figures['peak_mib']:.0f} |",
                    flush=True,
                )
    first, last = rows[0], rows[-1]
    pixels = (float(str(last["side"])) / float(str(first["side"]))) ** 2
    memory = float(str(last["peak_mib"])) / float(str(first["peak_mib"]))
    print(f"{pixels:.0f} times the pixels take {memory:.2f} times the peak memory")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
