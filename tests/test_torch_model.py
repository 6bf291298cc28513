"""The one PyTorch definition of every stage against the modules of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="the definition needs the `export` extra")
pytest.importorskip("transformers")

import torch
import transformers

from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import ClipTower
from lrs_edge_export.torch_model import decoder, stages, tower
from tests.scripts import TRAIN, scripts

VOCABULARY, LENGTH = 11, 9


class InMemory:
    """A `TensorSource` of a module's weights."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self._tensors = {name: value.detach().float().numpy() for name, value in state.items()}

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name][start:stop]


def judge(kind: str, config: DecoderConfig, seed: int = 0) -> Any:
    """A random language model of transformers; its norms are not all ones."""
    torch.manual_seed(seed)
    found = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.eps,
            rope_theta=config.theta,
            max_position_embeddings=1 << 16,
            initializer_range=0.3,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, value in found.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(torch.randn_like(value), alpha=0.3)
    return found.eval()


def stage_of(model: Any, config: DecoderConfig) -> DecoderStage:
    stage = DecoderStage(config, Scoped(InMemory(model.state_dict()), "model."))
    stage.check("language model")
    return stage


def close(found: torch.Tensor, wanted: torch.Tensor, limit: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= limit * float(wanted.abs().max())


@st.composite
def configs(draw: st.DrawFn, kind: str) -> DecoderConfig:
    kv_heads, group = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4)))
    heads, width = kv_heads * group, draw(st.sampled_from((4, 16)))
    return DecoderConfig(
        layers=2,
        # LLaMA's heads need not share the hidden width among them.
        hidden=heads * width if kind == "Qwen2" else 24,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=20,
        eps=draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        theta=draw(st.sampled_from((1e4, 1e6))),
        qkv_bias=kind == "Qwen2",
    )


def inputs(seed: int, config: DecoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and positions with gaps, of a sequence far into the context."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.choice(30_000, LENGTH, replace=False))
    embeds = rng.standard_normal((LENGTH, config.hidden)).astype(np.float32)
    return torch.from_numpy(embeds), torch.from_numpy(places)


@pytest.mark.parametrize("kind", ["Qwen2", "Llama"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_logits_and_scores_are_those_of_transformers(kind: str, data: st.DataObject) -> None:
    config = data.draw(configs(kind))
    seed = data.draw(st.integers(0, 1000))
    model = judge(kind, config, seed)
    stage, (embeds, places) = stage_of(model, config), inputs(seed, config)
    with torch.inference_mode():
        wanted = model(
            inputs_embeds=embeds[None], position_ids=places[None], output_attentions=True
        )
    head = model.lm_head.weight.detach().numpy()
    close(stages.llm_logits(stage, head, embeds, LENGTH, places), wanted.logits[0])
    # The first layer as a scoring layer: its softmax over all tokens is transformers' attention.
    scoring = DecoderStage(replace(config, layers=1), stage.tensors, scoring=True)
    scores = stages.rfm_logits(scoring, embeds, places).softmax(-1)
    close(scores, wanted.attentions[1][0, :, -1])


CONFIG = DecoderConfig(2, 32, 4, 2, 8, 20, 1e-6, 1e6, qkv_bias=True)


def test_tokens_under_a_mask_and_in_a_batch_are_those_of_transformers() -> None:
    model = judge("Qwen2", CONFIG)
    stage = stage_of(model, CONFIG)
    rng = np.random.default_rng(1)
    embeds = torch.from_numpy(rng.standard_normal((2, LENGTH, 32)).astype(np.float32))
    places = torch.from_numpy(np.sort(rng.integers(0, 500, (2, LENGTH))))
    seen = torch.from_numpy(rng.random((2, 1, LENGTH, LENGTH)) < 0.5).tril()
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    with torch.inference_mode():
        wanted = model.model(inputs_embeds=embeds, position_ids=places, attention_mask=bias)
        for mask in (seen, bias):
            x, turns = embeds, decoder.rope(CONFIG, places)
            for layer in range(CONFIG.layers):
                weights = stages.read_layer(stage, layer, torch.device("cpu"))
                x = decoder.decoder_layer(CONFIG, weights, x, turns, decoder.masked(mask))
            close(stages.final_norm(stage, x), wanted.last_hidden_state)


def test_gradients_are_those_of_transformers() -> None:
    model = judge("Qwen2", CONFIG)
    embeds, places = inputs(3, CONFIG)
    embeds.requires_grad_(True)
    model.model(inputs_embeds=embeds[None], position_ids=places[None])[0].square().sum().backward()
    wanted, embeds.grad = embeds.grad, None
    x, turns = embeds, decoder.rope(CONFIG, places)
    own: list[dict[str, torch.Tensor]] = []
    for layer in model.model.layers:
        own.append({name: w.detach().clone() for name, w in layer.named_parameters()})
        for weight in own[-1].values():
            weight.requires_grad_(True)
        x = decoder.decoder_layer(CONFIG, own[-1], x, turns)
    decoder.rms_norm(x, model.model.norm.weight.detach(), CONFIG.eps).square().sum().backward()
    close(embeds.grad, wanted, 1e-4)
    for layer, weights in zip(model.model.layers, own, strict=True):
        for name, weight in layer.named_parameters():
            if not name.endswith("k_proj.bias"):  # A softmax does not see it: rounding is left.
                close(weights[name].grad, weight.grad, 1e-4)


def test_a_bias_that_a_checkpoint_has_is_added() -> None:
    weights = judge("Qwen2", CONFIG).model.layers[0].state_dict()
    embeds, places = inputs(4, CONFIG)
    turns = decoder.rope(CONFIG, places)
    without = {name: w for name, w in weights.items() if not name.endswith("bias")}
    found = [decoder.decoder_layer(CONFIG, w, embeds, turns) for w in (weights, without)]
    assert not torch.allclose(*found)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_clip_tower_is_that_of_transformers(activation: str) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=4,
        image_size=20,
        hidden_act=activation,
        initializer_factor=4.0,
        attn_implementation="eager",
    )
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(torch.randn_like(value), alpha=0.3)
    state = {name.removeprefix("vision_model."): w for name, w in model.state_dict().items()}
    clip = ClipTower(
        Scoped(InMemory(state), ""), 2, 24, 3, 40, 4, 5, config.layer_norm_eps, activation
    )
    clip.check()
    pixels = torch.randn(2, 3, 20, 20)
    with torch.inference_mode():
        wanted = model(pixels, output_hidden_states=True).hidden_states[2]
        x = tower.tower_embeddings(clip, pixels)
        for layer in range(clip.layers):
            x = tower.tower_layer(clip, layer, x)
        close(x, wanted)


def test_the_embedded_models_training_has_llamas_layers_and_names() -> None:
    config = DecoderConfig(2, 24, 3, 1, 8, 20, 1e-5, 1e5, qkv_bias=False)
    model = judge("Llama", config)
    with scripts(TRAIN) as importer:
        training: Any = importer("model")
        own = training.LanguageModel(
            training.ModelConfig(24, 20, 2, 3, 1, config.eps, config.theta, VOCABULARY)
        )
    own.load_state_dict(model.model.state_dict(), strict=True)
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    with torch.inference_mode():
        close(own(own.embed_tokens(ids)), model.model(ids).last_hidden_state)
        state, turns = own.embed_tokens(ids), decoder.rope(config, torch.arange(LENGTH)[None])
        query, key = own.layers[0].queries_keys(state, turns)
        attention = model.model(ids, output_attentions=True).attentions[0]
    products = query[:, :, -1:] @ key.transpose(-2, -1) / config.head_dim**0.5
    close(products.softmax(-1)[:, :, 0], attention[:, :, -1])
