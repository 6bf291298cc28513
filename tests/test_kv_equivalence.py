"""The property the KV cache rests on, on real engines.

Attention over a compacted cache equals attention over the full cache with the dropped tokens
masked: the LLM against transformers with such a mask, the RFM against its own masked flavour.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import KVCache, TokenKind, make_tokens
from lrs_edge.search.rfm import MASKED
from tests.golden_data import checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG_FIELDS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)

quick = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=["llama", "qwen"])
def variant(request: pytest.FixtureRequest, golden_bundles: dict[str, Path]) -> str:
    if request.param not in golden_bundles:
        pytest.skip("only a part of the golden data is here")
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(variant: str, golden_bundles: dict[str, Path]) -> Bundle:
    return open_bundle(golden_bundles[variant])


@pytest.fixture(scope="module")
def llm(bundle: Bundle) -> Decoder:
    manifest = bundle.manifest
    graph = OnnxGraph.load(bundle.file(manifest.llm.path(Flavour.GQA)), BackendOptions("cpu"))
    return Decoder(graph, manifest.llm, scoring=False)


@pytest.fixture(scope="module")
def rfm(bundle: Bundle) -> Decoder:
    spec = bundle.manifest.rfm
    graphs = [
        OnnxGraph.load(bundle.file(name), BackendOptions("cpu"))
        for name in (spec.path(Flavour.GQA), spec.path(Flavour.MASKED))
    ]
    return Decoder(graphs[0], spec, scoring=True, load_masked=lambda: graphs[1])


@pytest.fixture(scope="module")
def reference(variant: str) -> Any:
    """The checkpoint's language model in transformers, with eager attention for 4D masks."""
    from safetensors.torch import load_file

    folder = checkpoint(variant)
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    kind = {"llama": "Llama", "qwen": "Qwen2"}[variant]
    known = {key: config[key] for key in CONFIG_FIELDS}
    settled = getattr(transformers, f"{kind}Config")(
        **known, tie_word_embeddings=False, attn_implementation="eager"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(settled).eval().float()
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(str(file)))
    keep = {key: value.float() for key, value in state.items() if key in model.state_dict()}
    model.load_state_dict(keep, strict=True)
    return model


def embeds_of(decoder: Decoder, count: int, seed: int) -> np.ndarray:
    scale = 0.5
    random = np.random.default_rng(seed)
    return (scale * random.normal(size=(count, decoder.spec.hidden))).astype(np.float32)


def split_case(
    data: st.DataObject,
) -> tuple[int, np.ndarray, np.ndarray, int]:
    """Old tokens, which of them are kept, their (gapped) positions, new tokens."""
    old = data.draw(st.integers(2, 40))
    seed = data.draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)
    kept = random.random(old) < 0.6
    kept[data.draw(st.integers(0, old - 1))] = True
    positions = np.cumsum(random.integers(1, 4, size=old)) - 1
    return old, kept, positions.astype(np.int64), seed


def prefill(
    decoder: Decoder, embeds: np.ndarray, positions: np.ndarray, chunks: int = 1
) -> tuple[KVCache, np.ndarray]:
    cache = decoder.new_cache()
    logits = np.zeros(0)
    for part in np.array_split(np.arange(len(embeds)), chunks):
        tokens = make_tokens(positions[part], TokenKind.TILE)
        logits = decoder.forward(cache, embeds[part], tokens)
    return cache, logits


@quick
@given(data=st.data())
def test_llm_over_a_compacted_cache(llm: Decoder, reference: Any, data: st.DataObject) -> None:
    old, kept, positions, seed = split_case(data)
    new = data.draw(st.integers(1, 4))
    embeds = embeds_of(llm, old + new, seed)
    cache, _ = prefill(llm, embeds[:old], positions)
    cache.keep(np.flatnonzero(kept))
    later = cache.next_position + 5 + np.arange(new)
    tokens = make_tokens(later, TokenKind.QUESTION)
    found = llm.forward(cache, embeds[old:], tokens)

    visible = np.tril(np.ones((old + new, old + new), bool))
    visible[old:, :old] &= kept
    mask = np.where(visible, 0.0, np.finfo(np.float32).min)[None, None].astype(np.float32)
    with torch.inference_mode():
        wanted = reference(
            inputs_embeds=torch.from_numpy(embeds)[None],
            position_ids=torch.from_numpy(np.concatenate([positions, later]))[None],
            attention_mask=torch.from_numpy(mask),
        ).logits[0, -1, : found.shape[1]]
    assert np.abs(found[0] - wanted.numpy()).max() < 1e-3


@quick
@given(data=st.data())
def test_rfm_over_a_compacted_cache(rfm: Decoder, data: st.DataObject) -> None:
    old, kept, positions, seed = split_case(data)
    new = data.draw(st.integers(1, 4))
    embeds = embeds_of(rfm, old + new, seed)
    later = positions[-1] + 1 + np.arange(new)
    tokens = make_tokens(later, TokenKind.QUESTION)

    full, _ = prefill(rfm, embeds[:old], positions)
    bias = np.triu(np.full((new, old + new), MASKED, np.float32), old + 1)
    bias[:, np.flatnonzero(~kept)] = MASKED
    wanted = rfm.forward(full, embeds[old:], tokens, bias)[:, np.append(kept, [True] * new)]

    compact, _ = prefill(rfm, embeds[:old], positions)
    compact.keep(np.flatnonzero(kept))
    found = rfm.forward(compact, embeds[old:], tokens)
    assert np.abs(found - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())


@quick
@given(data=st.data())
def test_prefill_in_parts_and_truncation_change_nothing(
    llm: Decoder, rfm: Decoder, data: st.DataObject
) -> None:
    count, chunks = data.draw(st.integers(4, 600)), data.draw(st.integers(2, 4))
    prefix = data.draw(st.integers(1, count - 1))
    for decoder in (llm, rfm):
        embeds = embeds_of(decoder, count, count)
        positions = np.arange(count, dtype=np.int64)
        _, whole = prefill(decoder, embeds, positions)
        cache, parts = prefill(decoder, embeds, positions, chunks)
        assert np.abs(parts - whole).max() < 2e-3
        # Another question on the same prefix, and the first one again.
        cache.truncate(prefix)
        other = embeds_of(decoder, 3, 7)
        later = prefix + np.arange(3, dtype=np.int64)
        decoder.forward(cache, other, make_tokens(later, TokenKind.QUESTION))
        cache.truncate(prefix)
        again = decoder.forward(
            cache, embeds[prefix:], make_tokens(positions[prefix:], TokenKind.QUESTION)
        )
        assert np.abs(again - whole).max() < 2e-3


def test_logits_are_nobody_elses_memory(llm: Decoder) -> None:
    """The engine writes every step's logits to one place; callers keep those of earlier steps."""
    embeds = embeds_of(llm, 3, 1)
    cache = llm.new_cache()
    steps, seen = [], []
    for place in range(3):
        tokens = make_tokens(np.array([place], np.int64), TokenKind.ANSWER)
        steps.append(llm.forward(cache, embeds[place : place + 1], tokens))
        seen.append(steps[-1].copy())
    assert not np.array_equal(seen[0], seen[2])
    for kept, wanted in zip(steps, seen, strict=True):
        assert np.array_equal(kept, wanted)
