"""Packed sequences and the streamed teacher against one sequence per question, whole."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="distilling needs the `export` extra")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.search.rfm import token_scores
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage, Model
from lrs_edge_export.distill import teacher
from lrs_edge_export.distill.packing import PackedInput, pack
from lrs_edge_export.distill.start import with_start_layers
from lrs_edge_export.distill.student import Student
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.torch_model import stages
from tests.checkpoints import HIDDEN, LAYERS, write_nano, write_qwen

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen", "nano"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    write = {"qwen": write_qwen, "nano": write_nano}[request.param]
    folder = write(tmp_path_factory.mktemp("checkpoints") / request.param)
    return with_start_layers(read_model(find_checkpoint(str(folder))), (1, 2))


def packed(
    image: int = 30, local: tuple[int, int] = (10, 30), texts: tuple[int, ...] = (4, 1, 7)
) -> PackedInput:
    """Random tokens; local positions have gaps, and every text starts after them."""
    rng = np.random.default_rng(image)
    places = np.sort(rng.choice(3 * image, image, replace=False))
    starts = [places[-1] + 1 + np.arange(length) for length in texts]
    return PackedInput(
        embeds=rng.standard_normal((image + sum(texts), HIDDEN)).astype(np.float32),
        positions=np.concatenate([places, *starts]).astype(np.int64),
        image=image,
        local=local,
        lengths=texts,
    )


def alone(whole: PackedInput, question: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One question's sequence as inference has it: embeddings and positions."""
    start = whole.image + sum(whole.lengths[:question])
    rows = np.r_[: whole.image, start : start + whole.lengths[question]]
    return torch.from_numpy(whole.embeds[rows]), torch.from_numpy(whole.positions[rows])


def scores_alone(stage: DecoderStage, whole: PackedInput, question: int) -> np.ndarray:
    logits = stages.rfm_logits(stage, *alone(whole, question)).numpy()
    return token_scores(logits[:, slice(*whole.local)])


def test_packed_questions_equal_questions_alone(model: Model) -> None:
    whole = packed()
    scores = Student.read(model.region_focus, CPU).scores(whole)[-1].numpy()
    for question in range(len(whole.lengths)):
        wanted = scores_alone(model.region_focus, whole, question)
        np.testing.assert_allclose(scores[question], wanted, rtol=1e-4, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    image=st.integers(2, 12),
    texts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
)
def test_what_a_question_sees(image: int, texts: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, image - 1))
    whole = packed(image, (first, image), tuple(texts))
    config = DecoderConfig(1, HIDDEN, 4, 2, 16, 8, 1e-6, 1e4, qkv_bias=False)
    packing = pack(config, whole, CPU)
    mask = packing.mask.numpy()
    assert mask.shape == (sum(texts), image + sum(texts))
    for question, length in enumerate(texts):
        start = sum(texts[:question])
        for place in range(length):
            seen = set(range(image)) | {image + start + before for before in range(place + 1)}
            assert set(np.flatnonzero(mask[start + place])) == seen
        assert int(packing.last[question]) == image + start + length - 1


def test_the_streamed_teacher_equals_the_whole_one(model: Model) -> None:
    inputs = [packed(), packed(20, (5, 15), (3,))]
    found = dict(teacher.attention_by_layer(model.llm, inputs, (0, 2), CPU))
    assert set(found) == {0, 2}
    for layer, by_input in found.items():
        # The language model cut off at this layer, as if the layer were a scoring layer.
        cut = DecoderStage(replace(model.llm.config, layers=layer), model.llm.tensors, scoring=True)
        for whole, scores in zip(inputs, by_input, strict=True):
            for question in range(len(whole.lengths)):
                wanted = scores_alone(cut, whole, question)
                np.testing.assert_allclose(scores[question], wanted, rtol=1e-4, atol=1e-7)


def test_the_teacher_holds_one_layer_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, held, asked = teacher.read_layer, [], []

    def watched(stage: DecoderStage, layer: int, *rest: object, **more: object) -> object:
        gc.collect()
        assert not any(weight() is not None for weight in held)
        asked.append(layer)
        weights = read(stage, layer, *rest, **more)
        held.extend(weakref.ref(tensor) for tensor in weights.values())
        return weights

    monkeypatch.setattr(teacher, "read_layer", watched)
    list(teacher.attention_by_layer(model.llm, [packed()], (1,), CPU))
    assert asked == [0, 1]  # never beyond the last one that is wanted
    asked.clear()
    list(teacher.attention_by_layer(model.llm, [packed()], range(LAYERS), CPU))
    assert asked == list(range(LAYERS))


def test_a_student_of_the_first_layers_sees_what_the_teacher_sees(model: Model) -> None:
    whole = packed()
    student = Student.read(model.region_focus, CPU).scores(whole)
    found = dict(teacher.attention_by_layer(model.llm, [whole], (1, 2), CPU))
    for layer, scores in zip((1, 2), student, strict=True):
        np.testing.assert_array_equal(scores.numpy(), found[layer][0].numpy())


def test_a_student_does_not_change_what_it_was_read_from(model: Model) -> None:
    student = Student.read(model.region_focus, CPU)
    before = model.region_focus.read(0, "mlp.up_proj.weight").copy()
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    np.testing.assert_array_equal(model.region_focus.read(0, "mlp.up_proj.weight"), before)


def test_gradients_reach_every_weight(model: Model) -> None:
    student = Student.read(model.region_focus, CPU)
    for weight in student.parameters():
        weight.requires_grad_(True)
    whole = packed()
    last = student.scores(whole)[-1]
    torch.autograd.backward(last[:, 0].sum())
    idle = [name for name, weight in student.state().items() if not weight.grad.abs().sum() > 0]
    assert idle == []


def test_bf16_is_near_fp32(model: Model) -> None:
    whole = packed()
    exact = Student.read(model.region_focus, CPU).scores(whole)[-1]
    rough = Student.read(model.region_focus, CPU, half=True).scores(whole)[-1]
    assert rough.dtype == torch.float32
    assert float((exact - rough).abs().sum(-1).max()) < 0.3
    assert not torch.equal(exact, rough)


def test_checkpoints_are_only_read(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "qwen")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with_start_layers(read_model(find_checkpoint(str(folder))), (1, 2))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
