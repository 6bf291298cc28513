"""Runs the PyTorch model over calibration data, layer by layer, as statistics are asked for.

Graph writers ask in the order of layers, so one pass over the data is enough: what is held is the
states after the last layer, and one layer's weights and statistics. Asking for an earlier layer
starts again from the first. Every layer sees what the unquantized layers before it give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import DecoderStage
from lrs_edge_export.checkpoints.tensors import Array, Scoped
from lrs_edge_export.checkpoints.towers import TransformerTower
from lrs_edge_export.checkpoints.vision import VisionStage
from lrs_edge_export.quantization.kept_tensors import KeptTensors
from lrs_edge_export.quantization.results import KeptStates
from lrs_edge_export.quantization.statistics import InputObserver, InputStatistics
from lrs_edge_export.torch_model import stages, vision
from lrs_edge_export.torch_model.tower import tower_embeddings, tower_features, tower_layer

#: Last places of a sequence that count for `lm_head`: end of the question, and answer.
HEAD_PLACES = 64

#: Tiles that go through the vision encoder at once.
TILE_BATCH = 8

#: Linears that share their input with another. The RFM's last query projection is given the last
#: token only, too few for second moments; its key projection is given all of them.
_SAME_INPUT = {"qkv_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_SAME_SCORING = {"q_proj": "k_proj"}


class _Step:
    """Statistics of one layer's linears, gathered while the PyTorch model runs.

    Args:
        same: Linears left out, and whose statistics stand for theirs.
        second_moments: Whether second moments are wanted.
    """

    def __init__(self, same: dict[str, str], *, second_moments: bool) -> None:
        self._same = same
        self._wanted = second_moments
        self._observers: dict[str, InputObserver] = {}

    def observe(self, name: str, x: Tensor) -> None:
        """Take a linear's inputs [.., K]."""
        if _twin(name, self._same) != name:
            return
        if name not in self._observers:
            self._observers[name] = InputObserver(second_moments=self._wanted)
        self._observers[name].add(x)

    def results(self) -> dict[str, InputStatistics]:
        """By the name of the linear."""
        return {name: observer.result() for name, observer in self._observers.items()}


def _twin(name: str, same: dict[str, str]) -> str:
    """The linear whose inputs stand for this one's."""
    before, _, last = name.rpartition(".")
    return f"{before}.{same[last]}" if last in same else name


class DecoderCalibrator:
    """Inputs of the linears of a decoder, the RFM or the language model.

    Args:
        stage: The decoder.
        sequences: What it is run on.
        second_moments: Whether GPTQ will want second moments.
        head: Whether `lm_head` will be asked for.
        kept: States that an export that was killed has come to, and where this one's are kept.
    """

    def __init__(
        self,
        stage: DecoderStage,
        sequences: Sequence[TokenSequence],
        *,
        second_moments: bool,
        head: bool = False,
        kept: KeptStates | None = None,
    ) -> None:
        self._kept = kept
        self._weights = KeptTensors(stage.tensors)
        self._stage = replace(stage, tensors=Scoped(self._weights, ""))
        self._sequences = sequences
        self._moments = second_moments
        # A layer after the last full one: the scoring layer, or the language model's head.
        self._count = stage.config.layers + (stage.scoring or head)
        self._restart()

    def inputs(self, name: str) -> InputStatistics:
        """Statistics of one linear's inputs, such as `layers.0.mlp.down_proj` or `lm_head`.

        Raises:
            KeyError: The stage has no such linear, or its head was not asked for.
            ExportError: Activations are not finite.
        """
        layer = self._layer_of(name)
        if layer is None or layer >= self._count:
            raise KeyError(f"{name} is not a linear of this decoder whose inputs are observed")
        if layer < self._layer:
            self._restart()
        if self._layer < 0 and self._kept is not None:
            self._go_on(self._kept, layer)
        with torch.inference_mode():
            while self._layer < layer:
                self._advance()
        scoring = layer == self._stage.config.layers
        twin = _twin(name, _SAME_SCORING if scoring else _SAME_INPUT)
        if twin not in self._found:
            raise KeyError(f"{name} is not a linear of this decoder whose inputs are observed")
        return self._found[twin]

    def _layer_of(self, name: str) -> int | None:
        if name == "lm_head":
            return None if self._stage.scoring else self._stage.config.layers
        parts = name.split(".")
        number = parts[1] if len(parts) == 4 and parts[0] == "layers" else ""
        return int(number) if number.isdecimal() else None

    def _restart(self) -> None:
        self._layer = -1
        self._states = [
            stages.first_states(self._stage, torch.from_numpy(sequence.values))
            for sequence in self._sequences
        ]
        self._found: dict[str, InputStatistics] = {}

    def _go_on(self, kept: KeptStates, layer: int) -> None:
        """Go on with kept states, if they are not beyond a layer."""
        found = kept.load()
        if found is not None and found[0] <= layer and len(found[1]) == len(self._sequences):
            self._layer = found[0] - 1
            self._states = [torch.from_numpy(x) for x in found[1]]

    def _advance(self) -> None:
        """Run the next layer over all sequences."""
        self._layer += 1
        if self._kept is not None and self._layer > 0:
            self._kept.save(self._layer, [x.numpy() for x in self._states])
        self._found = {}
        self._weights.forget()
        stage, layer = self._stage, self._layer
        full = layer < stage.config.layers
        step = _Step(_SAME_INPUT if full else _SAME_SCORING, second_moments=self._moments)
        for i, x in enumerate(self._states):
            given = self._sequences[i]
            turns = stages.turns_of(stage, given)
            if full:
                found = stages.run_layer(stage, layer, x, turns, step.observe)
                added = stages.add_later(stage, layer, found, torch.from_numpy(given.values))
                self._states[i] = added
            elif stage.scoring:
                stages.scoring_logits(stage, x, turns, step.observe)
            else:
                step.observe("lm_head", stages.final_norm(stage, x[-HEAD_PLACES:]))
        self._weights.forget()
        self._found = step.results()
        if layer == self._count - 1:
            # Nothing comes after; statistics of earlier layers would start again anyway.
            self._states = []


class VisionCalibrator:
    """Inputs of the linears of a vision stage: a transformer's and the projector's.

    Args:
        stage: Tower and projector.
        tiles: float32 [N, 3, S, S], normalised.
        second_moments: Whether GPTQ will want second moments.
    """

    def __init__(self, stage: VisionStage, tiles: Array, *, second_moments: bool) -> None:
        self._stage = stage
        self._tiles = torch.from_numpy(tiles)
        self._moments = second_moments
        self._layers = stage.tower.layers if isinstance(stage.tower, TransformerTower) else 0
        self._restart()

    def inputs(self, name: str) -> InputStatistics:
        """Statistics of one linear's inputs, such as `encoder.layers.0.mlp.fc1`, `projector.0`.

        Raises:
            KeyError: The stage has no such linear.
            ExportError: Activations are not finite.
        """
        layer = self._layer_of(name)
        if layer is None or layer > self._layers:
            raise KeyError(f"{name} is not a linear of this vision stage")
        if layer < self._layer:
            self._restart()
        with torch.inference_mode():
            while self._layer < layer:
                self._advance()
        twin = _twin(name, _SAME_INPUT)
        if twin not in self._found:
            raise KeyError(f"{name} is not a linear of this vision stage")
        return self._found[twin]

    def _layer_of(self, name: str) -> int | None:
        parts = name.split(".")
        if parts[0] == "projector":
            return self._layers
        encoder = len(parts) == 5 and parts[:2] == ["encoder", "layers"]
        number = parts[2] if encoder else ""
        return int(number) if number.isdecimal() and int(number) < self._layers else None

    def _restart(self) -> None:
        self._layer = -1
        self._states: list[Tensor] = []
        self._found: dict[str, InputStatistics] = {}

    def _advance(self) -> None:
        """Run the next layer over all tiles; the projector comes after the tower's last."""
        if self._layer < 0:
            self._states = [self._first(tiles) for tiles in torch.split(self._tiles, TILE_BATCH)]
        self._layer += 1
        self._found = {}
        tower = self._stage.tower
        step = _Step(_SAME_INPUT, second_moments=self._moments)
        if isinstance(tower, TransformerTower) and self._layer < self._layers:
            weights = KeptTensors(tower.tensors)
            kept = replace(tower, tensors=Scoped(weights, ""))
            for i, x in enumerate(self._states):
                self._states[i] = tower_layer(kept, self._layer, x, step.observe)
        else:
            tensors = Scoped(KeptTensors(self._stage.projector.tensors), "")
            projector = replace(self._stage.projector, tensors=tensors)
            stage = replace(self._stage, projector=projector)
            for x in self._states:
                features = tower_features(tower, x) if isinstance(tower, TransformerTower) else x
                vision.project(stage, features, step.observe)
        self._found = step.results()
        if self._layer == self._layers:
            self._states = []

    def _first(self, tiles: Tensor) -> Tensor:
        """What the first encoder layer is given; of an EfficientNet, its features."""
        tower = self._stage.tower
        if isinstance(tower, TransformerTower):
            return tower_embeddings(tower, tiles)
        return vision.vision_features(self._stage, tiles)
