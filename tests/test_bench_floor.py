"""Floors against figures worked out by hand, and the machine's peaks."""

from __future__ import annotations

import numpy as np
import pytest

from lrs_edge.benchmarking import peaks as bench_peaks
from lrs_edge.benchmarking.floor import (
    Floor,
    Peaks,
    Work,
    decoder_arithmetic,
    floor_of,
    graph_work,
    vision_arithmetic,
)
from lrs_edge.benchmarking.measure import Spread, Stopwatch, repeat
from lrs_edge.benchmarking.peaks import measure_peaks
from lrs_edge.engines.metered import GraphWork
from lrs_edge.evaluation.flops import GraphCost

MIB = 1 << 20
PEAKS = Peaks({"fp32": 100.0, "int8": 400.0}, {4 * MIB: 80.0, 16 * MIB: 60.0, 256 * MIB: 20.0})


def test_the_slower_of_two_limits_is_the_floor() -> None:
    # 1000 operations take 10 s; 100 bytes from memory take 5 s, 400 take 20 s.
    big = 512 * MIB
    assert floor_of(Work(1000, 100, big, ("fp32",)), PEAKS) == Floor(10.0, "compute")
    assert floor_of(Work(1000, 400, big, ("fp32",)), PEAKS) == Floor(20.0, "memory")
    # Where the engine may choose its arithmetic, the fastest bounds it.
    assert floor_of(Work(1000, 20, big, ("fp32", "int8")), PEAKS) == Floor(2.5, "compute")


def test_what_fits_into_caches_is_read_as_fast_as_caches_are() -> None:
    assert PEAKS.bandwidth_of(1) == 80.0
    assert PEAKS.bandwidth_of(5 * MIB) == 80.0
    assert PEAKS.bandwidth_of(16 * MIB) == 60.0
    assert PEAKS.bandwidth_of(255 * MIB) == 60.0
    assert PEAKS.bandwidth_of(1 << 40) == 20.0
    # A figure that a neighbour spoiled does not make floors that are too high.
    assert Peaks({}, {MIB: 1.0, 2 * MIB: 5.0}).bandwidth_of(MIB) == 5.0


def test_no_floor_without_the_peaks_it_needs() -> None:
    assert floor_of(Work(1000, 100, MIB, ("fp16",)), PEAKS) is None
    assert floor_of(Work(0, 100, MIB), Peaks({}, {})) is None
    assert floor_of(Work(0, 160, MIB), PEAKS) == Floor(2.0, "memory")


def test_bytes_of_decoding_are_weights_and_keys_seen_of_every_step() -> None:
    cost = GraphCost("llm", per_token=10, per_pair=2, per_run=100)
    # Three steps after 5 tokens see 6, 7 and 8 keys, and write one each.
    done = GraphWork(runs=3, tokens=3, pairs=21)
    work = graph_work(done, cost, weights=1000, arithmetic=("fp32",), place=4)
    assert work.operations == 30 + 42 + 300
    assert work.moved == 3000 + 4 * (21 + 3)
    assert work.working_set == work.moved // 3


def test_bytes_of_prefill_are_never_more_than_attention_reads() -> None:
    cost = GraphCost("llm")
    new, past = 8, 4
    done = GraphWork(runs=1, tokens=new, pairs=new * past + new * (new + 1) // 2)
    work = graph_work(done, cost, weights=0, arithmetic=("fp32",), place=1)
    assert new + past < work.moved <= (new + past) + new


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-dynamic", "int8-static", "int8"])
def test_stored_precision_decides_what_may_be_computed(precision: str) -> None:
    decoder, vision = decoder_arithmetic(precision), vision_arithmetic(precision)
    assert ("int8" in decoder) == precision.startswith("int8")
    assert ("int8" in vision) == precision.startswith("int8-")
    assert ("fp32" in decoder) == (precision in ("fp32", "fp16", "int8"))


def test_peaks_of_this_machine() -> None:
    peaks = measure_peaks("cpu", 1, ["fp32", "int8", "fp32"], [1, 3 * MIB, 1 << 45], seconds=0.01)
    assert list(peaks.compute) == ["fp32", "int8"]
    assert min(peaks.compute.values()) > 1e8
    assert list(peaks.bandwidth)[:2] == [MIB, 2 * MIB]
    assert max(peaks.bandwidth) >= 256 * MIB
    assert min(peaks.bandwidth.values()) > 1e8


def test_arithmetic_that_the_provider_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = ("MatMulInteger", "float32", "float32", "float32")
    monkeypatch.setitem(bench_peaks._PRODUCTS, "int8", lacking)
    assert measure_peaks("cpu", 1, ["int8"], [], seconds=0.01).compute == {}


def test_spread() -> None:
    assert Spread.of((3.0,)) == Spread(3.0, 0.0, 3.0, 3.0)
    found = Spread.of((1.0, 2.0, 6.0))
    assert (found.median, found.least, found.most) == (2.0, 1.0, 6.0)
    assert found.deviation == pytest.approx(np.std([1, 2, 6], ddof=1))


def test_the_warm_up_is_not_counted() -> None:
    calls: list[int] = []

    def once(watch: Stopwatch) -> None:
        watch.time(lambda: calls.append(1))

    assert len(repeat(once, 3, warmup=True).seconds) == 3
    assert len(calls) == 4
    assert len(repeat(once, 3, warmup=False).seconds) == 3
    assert len(calls) == 7
