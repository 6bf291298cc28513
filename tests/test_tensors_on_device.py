"""Tensors between graphs: what stays on a device gives the numbers that the host's arrays give."""

from __future__ import annotations

import numpy as np
import pytest

from lrs_edge.bundle.bundle import default_bundle_path
from lrs_edge.engines import onnx
from lrs_edge.engines.base import BackendOptions, Feed, HostTensor
from lrs_edge.engines.onnx import OnnxGraph, OrtTensor

BUNDLE = default_bundle_path()


@pytest.fixture(scope="module")
def segments() -> list[OnnxGraph]:
    options = BackendOptions("cpu", threads=1)
    return [OnnxGraph.load(BUNDLE / f"llm_segment{i}.onnx", options) for i in range(2)]


def feeds(embeds: Feed, length: int, past: int) -> dict[str, Feed]:
    return {
        "inputs_embeds": embeds,
        "position_ids": np.arange(past, past + length)[None],
        "past_length": np.array([past]),
    }


def names(graph: OnnxGraph) -> list[str]:
    return [name.removeprefix("past_") for name in graph.inputs if name.startswith("past_k")] + [
        name.removeprefix("past_") for name in graph.inputs if name.startswith("past_v")
    ]


@pytest.mark.parametrize("way", ["host", "wrapped", "device"])
def test_a_chain_of_graphs_gives_the_same_numbers(segments: list[OnnxGraph], way: str) -> None:
    first, last = segments
    rng = np.random.default_rng(0)
    caches = [[graph.new_buffers(names(graph)) for graph in segments] for _ in range(2)]
    past = 0
    for length in (5, 1, 1):
        embeds = rng.standard_normal((1, length, 576)).astype(np.float32)
        for pair in caches:
            for cache in pair:
                cache.gather(np.arange(past), past + length)
        (states,) = first.run(feeds(embeds, length, past), ["hidden_states"], caches[0][0])
        (wanted,) = last.run(feeds(states, length, past), ["logits"], caches[0][1])
        given: Feed = embeds
        if way == "device":
            given = OrtTensor(onnx.ort.OrtValue.ortvalue_from_numpy(embeds))
            # What a device other than the CPU does: outputs stay in the engine's own memory.
            (moved,) = first._run_kept(feeds(given, length, past), ["hidden_states"], caches[1][0])
            assert isinstance(moved, OrtTensor)
        elif way == "wrapped":
            given = HostTensor(embeds)
            (moved,) = first.run_on_device(
                feeds(given, length, past), ["hidden_states"], caches[1][0]
            )
        else:
            (moved,) = first.run_on_device(
                feeds(given, length, past), ["hidden_states"], caches[1][0]
            )
        assert (moved.shape, moved.device) == ((1, length, 576), "cpu")
        (found,) = last.run(feeds(moved, length, past), ["logits"], caches[1][1])
        np.testing.assert_array_equal(found, wanted)
        past += length


def test_kept_outputs_are_not_written_over(segments: list[OnnxGraph]) -> None:
    graph = segments[0]
    cache = graph.new_buffers(names(graph))
    cache.gather(np.arange(0), 8)
    one, other = (np.full((1, 3, 576), value, np.float32) for value in (0.1, -0.4))
    (kept,) = graph._run_kept(feeds(one, 3, 0), ["hidden_states"], cache)
    before = kept.numpy().copy()
    graph._run_kept(feeds(other, 3, 0), ["hidden_states"], cache)
    np.testing.assert_array_equal(kept.numpy(), before)


def test_tensors_on_the_host_are_not_copied() -> None:
    array = np.zeros((2, 3), np.float32)
    assert HostTensor(array).numpy() is array
    graph = OnnxGraph.load(BUNDLE / "vision.onnx", BackendOptions("cpu", threads=1))
    pixels = np.random.default_rng(1).standard_normal((1, 3, 384, 384)).astype(np.float32)
    (wanted,) = graph.run({"pixel_values": pixels}, ["tokens"])
    for feed in (HostTensor(pixels), OrtTensor(onnx.ort.OrtValue.ortvalue_from_numpy(pixels))):
        (found,) = graph.run_on_device({"pixel_values": feed}, ["tokens"])
        np.testing.assert_array_equal(found.numpy(), wanted)
        (kept,) = graph._run_kept({"pixel_values": feed}, ["tokens"], None)
        np.testing.assert_array_equal(kept.numpy(), wanted)
