"""Decoder graphs for TensorRT beside the bundle's own, both on onnxruntime's CPU provider."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from lrs_edge.engines.runtime import ort

#: Places of the buffers.
CAPACITY = 320
#: Lengths of what is run after one another, until tokens are dropped, and after.
CHUNKS, LATER = (90, 170, 3, 1), (5, 1)
KEPT = 150
_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class _Session:
    """A decoder graph on onnxruntime, with buffers of its own."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Blocks of integers are multiplied in float32, with and without zero points.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._session = ort.InferenceSession(
            str(_in_floats(path)), options, ["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value.shape for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._buffers = {
            value.name: np.zeros(
                [CAPACITY if size == "S" else size for size in value.shape], _KINDS[value.type]
            )
            for value in self._session.get_inputs()
            if value.name.startswith("past_") and value.name != "past_length"
        }

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: value for name, value in feeds.items() if name in self.inputs}
        found = self._session.run(None, {**given, **self._buffers})
        results = dict(zip(self.outputs, found, strict=True))
        for name in self._buffers:
            self._buffers[name] = results.pop(name.replace("past_", "present_"))
        return results

    def keep(self, places: np.ndarray) -> None:
        for name, buffer in self._buffers.items():
            self._buffers[name] = np.zeros_like(buffer)
            self._buffers[name][:, :, : len(places)] = buffer[:, :, places]


def assert_agree(ours: Path, theirs: Path, *, masked: bool = False, limit: float = 1e-4) -> None:
    """Run both over the same tokens, drop some, go on; positions stay what they were.

    Args:
        ours: Graph with static buffers.
        theirs: The bundle's own.
        masked: They take an attention bias.
        limit: Largest difference, as a share of the largest number if that is above 1.
    """
    sessions = [_Session(unlinked(ours)), _Session(theirs)]
    rng = np.random.default_rng(0)
    past, position = 0, 0
    for number, count in enumerate((*CHUNKS, *LATER)):
        if number == len(CHUNKS):
            places = np.sort(rng.permutation(past)[:KEPT])
            for session in sessions:
                session.keep(places)
            past = KEPT
        axes = sessions[1].inputs["position_ids"][0]
        feeds = {
            name: rng.standard_normal((1, count, shape[2])).astype(np.float32)
            for name, shape in sessions[1].inputs.items()
            if name in ("inputs_embeds", "attended")
        }
        # Of tokens with several positions each axis goes its own way.
        steps = np.arange(1, axes + 1)[:, None]
        feeds["position_ids"] = position + np.arange(count) * steps
        feeds["past_length"] = np.array([past])
        past, position = past + count, position + count
        results = []
        for session in sessions:
            if masked:
                feeds["attention_bias"] = _bias(session, count, past)
            results.append(session.run(feeds))
        for name, wanted in results[1].items():
            # Scores are as long as the buffers.
            found = results[0][name][:, : wanted.shape[1]]
            wanted_here = wanted[:, : found.shape[1]]
            largest = np.abs(found - wanted_here).max() / max(np.abs(wanted_here).max(), 1)
            assert largest < limit, f"{name}: {largest}"


def _bias(session: _Session, count: int, total: int) -> np.ndarray:
    """Causality, and a token that nobody but itself sees."""
    size = session.inputs["attention_bias"][3]
    places = np.arange(size if isinstance(size, int) else total)
    own = np.arange(total - count, total)[:, None]
    seen = (places <= own) & ((places != 7) | (own == 7))
    return np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)[None, None]


def _in_floats(path: Path) -> Path:
    """The graph with weights in blocks multiplied in float32, not by activations of 8 bits."""
    model = onnx.load(str(path), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if not nodes:
        return path
    for node in nodes:
        for item in node.attribute:
            if item.name == "accuracy_level":
                item.i = 1
    other = path.with_name(f"floats_{path.name}")
    onnx.save(model, str(other))
    return other


def unlinked(path: Path) -> Path:
    """The graph with copies for links, which onnxruntime does not follow out of a folder."""
    for file in path.parent.iterdir():
        if file.is_symlink():
            source = file.resolve()
            file.unlink()
            shutil.copyfile(source, file)
    return path
