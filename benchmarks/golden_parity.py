"""Differences from the authors' arrays, over all golden runs that are here.

Exports both golden checkpoints at fp32 and repeats every run with the reference policy; the other
side are the golden files. `tests/test_parity.py` asserts what this prints.

    python -m benchmarks.golden_parity
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import lrs_edge
from benchmarks.measure import parser_for
from lrs_edge_export.bundle.writer import ExportOptions, export_bundle
from tests.golden_data import CHECKPOINTS, checkpoint, load_run, run_names
from tests.test_parity import check_run, trace_of

SCORES = ("rfm1_attn", "rfm2_attn", "rfm2_attn_if_properly_masked")


def main() -> None:
    """Run, check and print the largest differences of each family."""
    parser_for(__doc__).parse_args()
    print("| checkpoint | runs | RFM scores, of the largest score | first-step logits |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for variant, name in CHECKPOINTS.items():
            source = checkpoint(variant)
            if source is None:
                continue
            bundle = Path(folder) / variant
            export_bundle(str(source), bundle, ExportOptions(parity=False))
            runs = [load_run(run) for run in run_names() if run.startswith(variant)]
            scores, logits = 0.0, 0.0
            with lrs_edge.load(bundle, provider="cpu") as engine:
                for run in runs:
                    found = trace_of(engine, run, Path(folder) / "trace.npz")
                    check_run(run, found)
                    for key in SCORES:
                        wanted = run.arrays[key]
                        scores = max(scores, np.abs(found[key] - wanted).max() / wanted.max())
                    first = np.abs(found["step_logits"][0] - run.arrays["step_logits"][0]).max()
                    logits = max(logits, float(first))
            print(f"| {name} | {len(runs)} | {scores:.1e} | {logits:.1e} |", flush=True)


if __name__ == "__main__":
    main()
