"""`distill` on the layouts that transformers and others have: nested configs, other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="distilling needs the `export` extra")
pytest.importorskip("transformers", reason="exporting needs the `export` extra")

import torch
from safetensors.torch import load_file

from lrs_edge.errors import ExportError
from lrs_edge_export.checkpoints.checkpoint import Settings, find_checkpoint
from lrs_edge_export.checkpoints.tensors import open_tensors
from lrs_edge_export.distill import DistillOptions, Sampling, TrainOptions, distill
from lrs_edge_export.families.parts import PRUNER
from lrs_edge_export.families.registry import read_model
from lrs_edge_export.families.sizes import read_sizes
from tests import test_family_idefics3 as idefics3
from tests import test_family_internvl as internvl
from tests import test_family_llava_1_5 as llava_1_5
from tests import test_family_qwen_vl as qwen_vl
from tests import transformers_parity as parity


def _llava(folder: Path) -> None:
    llava_1_5.written(folder, text={"max_position_embeddings": 2048})


def _internvl(folder: Path) -> None:
    internvl.written(folder, internvl.PLAIN)


def _internvl_own(folder: Path) -> None:
    qwen3 = {"model_type": "qwen3", "head_dim": 32}
    internvl.written(folder.with_name("converted"), internvl.PLAIN, tied=False, **qwen3)
    internvl.written_originally(folder, folder.with_name("converted"))


def _qwen2_vl(folder: Path) -> None:
    qwen_vl.written(folder, "Qwen2VL")


def _smolvlm(folder: Path) -> None:
    idefics3.written(folder, "SmolVLM", tile=56, patch=14, factor=2)


WRITERS: dict[str, Callable[[Path], None]] = {
    "llava-1.5": _llava,
    "internvl": _internvl,
    "internvl's own layout, qwen3": _internvl_own,
    "qwen2-vl": _qwen2_vl,
    "idefics3": _smolvlm,
}

#: The layers of `--rfm from-llm:1`, so that there is nothing to learn; and others.
FIRST = DistillOptions(
    layer_list=(1,),
    precision="fp32",
    sampling=Sampling(tiles=2),
    train=TrainOptions(steps=2, rate=3e-3, batch=1),
)
LATER = replace(FIRST, layer_list=(2,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, each with a question."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, text in enumerate(("What is this?", "Where is the ship?")):
        pixels = np.random.default_rng(number).integers(0, 256, (100, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        values = {"question_id": number, "image": f"{number}.png", "text": text}
        lines.append(json.dumps(values | {"ground_truth": "x", "hbox": [10, 10, 60, 50]}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("family", WRITERS)
def test_an_rfm_of_the_first_layers_is_that_of_from_llm(
    family: str, data: Path, tmp_path: Path
) -> None:
    WRITERS[family](tmp_path / "source")
    distill(str(tmp_path / "source"), data, tmp_path / "new", FIRST)
    model = read_model(find_checkpoint(str(tmp_path / "new")))
    assert model.region_focus.config == replace(model.llm.config, layers=1)
    bundles = {
        "new": parity.exported(tmp_path / "new", tmp_path / "new.bundle"),
        "source": parity.exported(tmp_path / "source", tmp_path / "source.bundle", rfm_layers=1),
    }
    image = data / "0.png"
    found, wanted = (parity.asked(bundles[name], image) for name in ("new", "source"))
    assert found.ids == wanted.ids
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-4)
    assert np.array_equal(found.sequence.positions, wanted.sequence.positions)


@pytest.mark.parametrize("family", ["internvl's own layout, qwen3", "qwen2-vl"])
def test_only_the_rfm_is_new(family: str, data: Path, tmp_path: Path) -> None:
    WRITERS[family](tmp_path / "source")
    distill(str(tmp_path / "source"), data, tmp_path / "new", LATER)
    old = load_file(tmp_path / "source" / "model.safetensors")
    source = open_tensors(tmp_path / "new")
    new = {name: torch.from_numpy(source.read(name)) for name in source.names()}
    assert {name for name in new if not name.startswith(PRUNER)} == set(old)
    assert all(torch.equal(old[name], new[name]) for name in old)
    start = read_model(find_checkpoint(str(tmp_path / "source"))).llm.tensors
    for name in ("layers.0.mlp.up_proj.weight", "layers.1.self_attn.k_proj.weight"):
        before = torch.from_numpy(start.read(f"layers.{int(name[7]) + 1}{name[8:]}"))
        assert new[PRUNER + name].shape == before.shape
        assert not torch.equal(new[PRUNER + name], before)
        assert torch.allclose(new[PRUNER + name], before, atol=0.05)
    config = Settings.load(tmp_path / "new" / "config.json")
    assert read_sizes(config, "x").own_rfm == 1


def test_several_outputs_of_the_tower_are_refused(data: Path, tmp_path: Path) -> None:
    qwen_vl.written(tmp_path / "source", "Qwen3VL")
    with pytest.raises(ExportError, match=r"'qwen3-vl'.*--rfm from-llm"):
        distill(str(tmp_path / "source"), data, tmp_path / "new", FIRST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
