"""How far 4-bit weights move a language model: divergence from fp32 on a fixed text, in one run.

The language model is written to 4 bits with GPTQ on the calibration data, without zero points and
with them, down projections at 8 bits or not, and rounded without GPTQ for comparison. Each is run
over the text below, layer by layer as parity does it, and its next-token distributions are compared
with those of fp32 at every place: mean Kullback-Leibler divergence in nats, and the share of equal
first choices. Bits are those of the file, scales and zero points included.

Without `--checkpoint` the weights are those of the embedded bundle.

    python -m benchmarks.int4_text [--checkpoint DIR]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.embedded_checkpoint import write_checkpoint
from benchmarks.measure import head, parser_for
from lrs_edge.language.kv_cache import TokenKind, make_tokens
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.bundle.stages import LLM, StageWriter, calibrated
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import table_of
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.parity import layers
from lrs_edge_export.parity.pipeline import divergence
from lrs_edge_export.quantization import CalibrationData, load_calibration, precision
from lrs_edge_export.quantization.precision import Plan

TEXT = """A harbour lies in the north of the image, with three long piers and about forty boats.
East of it runs a road with two lanes, which crosses the river on a bridge near the centre. What is
on the left bank? Warehouses with flat roofs, some of them rusty, and a car park that is half empty.
How many storage tanks can be seen? There are nine white ones, four of them large. South of the
river, fields follow each other: wheat, maize, and meadows with single trees between. Is there an
airport? No, but the straight strip beside the forest may be a runway for small planes. The houses
of the village stand close together around a church, and their gardens reach down to the water. In
the lower right corner, a train of twelve waggons waits at a station with two platforms."""

#: Rows of the table: their name, whether GPTQ is used, zero points, and down projections at 8 bits.
WAYS = (
    ("rounded to nearest", False, False, False),
    ("rounded to nearest, zero points", False, True, False),
    ("GPTQ", True, False, False),
    ("GPTQ, zero points", True, True, False),
    ("GPTQ, down projections at 8 bits", True, False, True),
    ("GPTQ, zero points, down projections at 8 bits", True, True, True),
)

#: Of `table_cells`.
COLUMNS = ("bits of a weight", "divergence, nats", "same choice")


@dataclass(frozen=True)
class Apart:
    """How far a written language model is from fp32 on the text.

    Attributes:
        bits: Of a weight in the file, scales and zero points included.
        divergence: Mean Kullback-Leibler divergence of the next token, nats.
        agreed: Share of places with the same first choice.
    """

    bits: float
    divergence: float
    agreed: float


class Reference:
    """The text, and what the language model says of it at fp32."""

    def __init__(self, model: Model) -> None:
        ids = Tokenizer.from_str(model.tokenizer_json).encode(TEXT, add_special_tokens=False).ids
        embeds = table_of(model).lookup(np.array(ids, np.int64))
        places = np.tile(np.arange(len(ids), dtype=np.int64), (model.llm.config.position_axes, 1))
        self._text = TokenSequence(embeds, make_tokens(places, TokenKind.QUESTION))
        states = layers.reference_states(model.llm, [self._text])
        self._wanted = layers.reference_logits(model, states[0])

    def compare(self, model: Model, plan: Plan, folder: Path) -> Apart:
        """Write the language model into a new folder as planned, and run it over the text."""
        folder.mkdir()
        with StageWriter(model, folder) as writer:
            writer.write("llm", plan)
            weights = writer.weights["llm"]
            (found,) = layers.engine_logits(model, weights, [self._text], len(self._wanted))
            bits = 8 * (folder / f"{LLM}.data").stat().st_size / sum(weights.sizes.values())
        agreed = float((found.argmax(1) == self._wanted.argmax(1)).mean())
        return Apart(bits, divergence(found, self._wanted), agreed)


def table_cells(apart: Apart) -> str:
    """Cells of `COLUMNS`."""
    return f"{apart.bits:.2f} | {apart.divergence:.4f} | {apart.agreed:.1%}"


def down_projections(model: Model) -> frozenset[str]:
    """Names of the layers that are kept higher."""
    return frozenset(f"layers.{i}.mlp.down_proj" for i in range(model.llm.config.layers))


def measure(model: Model, data: CalibrationData, folder: Path) -> Iterator[tuple[str, Apart]]:
    """Every way by name, and how far it is from fp32."""
    reference, down = Reference(model), down_projections(model)
    for number, (name, feeds_back, zero_points, keeps) in enumerate(WAYS):
        precision.ZERO_POINTS["cpu"] = zero_points
        plan = Plan("int4-weight", higher=down if keeps else frozenset())
        if feeds_back:
            plan = calibrated(plan, "llm", model, lambda: data)
        yield name, reference.compare(model, plan, folder / str(number))


def main() -> None:
    """Print the table."""
    parser = parser_for(__doc__)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = arguments.checkpoint or write_checkpoint(None, folder / "checkpoint")
        model = read_model(find_checkpoint(str(checkpoint)), None)
        print(head(("4-bit weights", *COLUMNS)))
        for name, apart in measure(model, load_calibration(None, model), folder):
            print(f"| {name} | {table_cells(apart)} |", flush=True)


if __name__ == "__main__":
    main()
