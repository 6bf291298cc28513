"""Vision transformers and projectors: PyTorch model and graph against transformers' own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="towers are read with the `export` extra")
pytest.importorskip("transformers")
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from lrs_edge.engines.runtime import ort
from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.projector import Projector
from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.checkpoints.towers import ClipTower, SiglipTower, TransformerTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.graphs.vision_graph import write_vision
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.torch_model import vision
from lrs_edge_export.torch_model.tower import read

ONES = (1.0, 1.0, 1.0)


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


def scoped(module: torch.nn.Module) -> Scoped:
    """A module's weights, which are made other than the ones and zeros they start as."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.add_(torch.randn_like(value), alpha=0.3)
    return Scoped(InMemory(module.state_dict()), "")


def linears(width: int, hidden: int) -> Projector:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
    )
    return Projector(scoped(layers))


def stage_of(tower: TransformerTower, projector: Projector, tile: int, hidden: int) -> VisionStage:
    found = VisionStage(tower, projector, tower.hidden, hidden, tile, 1, ONES, ONES)
    found.check()
    return found


def tokens_of(stage: VisionStage, pixels: torch.Tensor, folder: Path) -> np.ndarray:
    """Tokens by the graph, which must be the PyTorch model's."""
    path = folder / "vision.onnx"
    with WeightFile(folder / "vision.onnx.data") as weights:
        write_vision(stage, path, weights)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (tokens,) = session.run(["tokens"], {"pixel_values": pixels.numpy()})
    mirrored = vision.vision_tokens(stage, pixels).numpy()
    np.testing.assert_allclose(tokens, mirrored, rtol=0, atol=2e-5)
    assert tokens.shape == (len(pixels), stage.grid**2, stage.hidden)
    return tokens


def projected(projector: Projector, x: torch.Tensor) -> np.ndarray:
    """Two linear layers, apart from all code that is tested."""
    for number, name in enumerate(projector.linears):
        x = torch.nn.functional.gelu(x) if number else x
        weight, bias = (read(projector.tensors, f"{name}.{part}") for part in ("weight", "bias"))
        x = torch.nn.functional.linear(x, weight, bias)
    return x.numpy()


def siglip(side: int, patch: int, **config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            image_size=side, patch_size=patch, vision_use_head=False, **config,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("side", "patch", "layers", "final"),
    [(384, 14, 3, False), (20, 4, 3, True), (20, 4, 2, False)],
    ids=["a part of a patch is left over", "the last output", "the last but one hidden state"],
)
def test_siglip_is_that_of_transformers(
    side: int, patch: int, layers: int, final: bool, tmp_path: Path
) -> None:
    model = siglip(side, patch)
    tensors = scoped(model)
    tower = SiglipTower(
        tensors, layers, 24, 3, 40, patch, side // patch, 1e-6, "gelu_tanh", final_norm=final
    )
    stage = stage_of(tower, linears(24, 16), side, 16)
    pixels = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        found = model(pixels, output_hidden_states=True)
    features = found.last_hidden_state if final else found.hidden_states[layers]
    wanted = projected(stage.projector, features)
    np.testing.assert_allclose(tokens_of(stage, pixels, tmp_path), wanted, rtol=0, atol=1e-4)


def test_clips_positions_for_another_grid_are_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        image_size=20, patch_size=4, initializer_factor=4.0,
    )  # fmt: skip
    model = transformers.CLIPVisionModel(config).eval()
    tensors = scoped(model)
    tower = ClipTower(tensors, 2, 24, 3, 40, 4, 7, config.layer_norm_eps, "quick_gelu", 5)
    stage = stage_of(tower, linears(24, 16), 28, 16)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        states = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    wanted = projected(stage.projector, states.hidden_states[2][:, 1:])
    np.testing.assert_allclose(tokens_of(stage, pixels, tmp_path), wanted, rtol=0, atol=1e-4)
    aligned = ClipTower(
        tensors, 2, 24, 3, 40, 4, 7, config.layer_norm_eps, "quick_gelu", 5, align_corners=True
    )
    table = tensors.read("embeddings.position_embedding.weight")
    # With corners aligned, the outermost entries stay what they are.
    np.testing.assert_allclose(aligned.positions()[[0, 1, 7, -1]], table[[0, 1, 5, -1]], atol=1e-6)


def test_a_pixel_shuffle_joins_squares_as_transformers_does(tmp_path: Path) -> None:
    model = siglip(24, 4)
    tower = SiglipTower(scoped(model), 3, 24, 3, 40, 4, 6, 1e-6, "gelu_tanh")
    config = transformers.Idefics3Config(
        vision_config={"hidden_size": 24},
        text_config={"hidden_size": 16, "num_attention_heads": 2},
        scale_factor=3,
    )
    connector = Idefics3Connector(config).eval()
    projector = Projector(scoped(connector), ("modality_projection.proj",), bias=False, shuffle=3)
    stage = stage_of(tower, projector, 24, 16)
    assert stage.grid == 2
    pixels = torch.randn(2, 3, 24, 24)
    with torch.inference_mode():
        features = model(pixels, output_hidden_states=True).hidden_states[3]
        wanted = connector(features.contiguous()).numpy()
    np.testing.assert_allclose(tokens_of(stage, pixels, tmp_path), wanted, rtol=0, atol=1e-4)


def test_a_grid_that_cannot_be_joined_is_refused() -> None:
    tower = SiglipTower(scoped(siglip(20, 4)), 3, 24, 3, 40, 4, 5, 1e-6, "gelu")
    with pytest.raises(ExportError, match="5 patches along a tile's side cannot be joined by 2"):
        stage_of(tower, Projector(Scoped(InMemory({}), ""), ("proj",), shuffle=2), 20, 16)


def test_tensors_that_would_be_left_out_are_refused() -> None:
    model = siglip(20, 4)
    scale = {"encoder.layers.0.layer_scale1": torch.ones(24)}
    tensors = Scoped(InMemory(model.state_dict() | scale), "")
    tower = SiglipTower(tensors, 3, 24, 3, 40, 4, 5, 1e-6, "gelu_tanh")
    with pytest.raises(ExportError, match="layer_scale1, which the exported model would leave out"):
        tower.check()
