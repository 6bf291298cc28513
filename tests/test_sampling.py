"""Greedy and sampled decoding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lrs_edge.language.sampling import Sampler

logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40)


@given(logits_lists)
def test_greedy_takes_the_largest(values: list[float]) -> None:
    logits = np.array(values, np.float32)
    assert Sampler(0, 1.0, 0).choose(logits, []) == int(np.argmax(logits))


@given(logits_lists, st.integers(0, 1000))
def test_the_same_seed_gives_the_same_tokens(values: list[float], seed: int) -> None:
    logits = np.array(values, np.float32)
    first, second = Sampler(0.8, 0.9, seed), Sampler(0.8, 0.9, seed)
    assert [first.choose(logits, []) for _ in range(5)] == [
        second.choose(logits, []) for _ in range(5)
    ]


@given(logits_lists, st.floats(0.05, 1))
def test_only_tokens_of_the_nucleus_are_drawn(values: list[float], top_p: float) -> None:
    logits = np.array(values, np.float32)
    token = Sampler(1.0, top_p, 3).choose(logits, [])
    weights = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    better = weights[weights > weights[token]].sum()
    assert better < top_p + 1e-9


def test_a_small_nucleus_is_greedy() -> None:
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    assert {Sampler(1.0, 0.01, seed).choose(logits, []) for seed in range(20)} == {1}


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.7, 0.2, 0.1], np.float32))
    sampler = Sampler(1.0, 1.0, 0)
    draws = np.bincount([sampler.choose(logits, []) for _ in range(4000)], minlength=3) / 4000
    assert np.allclose(draws, [0.7, 0.2, 0.1], atol=0.03)


def test_the_repetition_penalty_applies_to_greedy_decoding_as_in_transformers() -> None:
    sampler = Sampler(0, 1.0, 0, repetition_penalty=2.0)
    logits = np.array([4.0, 3.0, -1.0], np.float32)
    assert sampler.choose(logits, []) == 0
    assert sampler.choose(logits, [0, 0]) == 1
    negative = np.array([-1.0, -1.5], np.float32)
    assert sampler.choose(negative, [0]) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    assert Sampler(1e-320, 1.0, 0).choose(np.array([1.0, 3.0, 2.0], np.float32), []) == 1


def test_some_tokens_count_as_generated_from_the_start() -> None:
    sampler = Sampler(0, 1.0, 0, repetition_penalty=2.0, penalised_ids=(0,))
    assert sampler.choose(np.array([4.0, 3.0], np.float32), []) == 1
