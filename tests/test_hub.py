"""Checkpoints from a simulated hub: what is fetched, in which order, and what is refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("huggingface_hub", reason="exporting needs the `export` extra")

from lrs_edge.errors import ExportError
from lrs_edge_export.bundle.options import ExportOptions
from lrs_edge_export.bundle.writer import export_bundle
from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
from lrs_edge_export.checkpoints.hub import download
from lrs_edge_export.families.registry import find_family, read_model
from tests.checkpoints import edit_json, write_json, write_nano, write_qwen
from tests.simulated_hub import SimulatedHub

MODEL, TOWER = "owner/model", "owner/tower-of-hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedHub]:
    root = tmp_path / "hub"
    folder = write_qwen(root / MODEL)
    (folder / "tower").rename(root / TOWER)
    edit_json(folder / "config.json", mm_vision_tower=TOWER)
    # What no export reads.
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"again")
    (folder / "README.md").write_text("# Model")
    write_json(folder / "trainer_state.json", {})
    write_json(folder / "pytorch_model.bin.index.json", {})
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    with SimulatedHub(root).served(monkeypatch, tmp_path / "cache") as served:
        yield served


def test_only_what_is_read_is_fetched_and_the_tower_from_its_own_repository(
    hub: SimulatedHub,
) -> None:
    told: list[str] = []
    found = find_checkpoint(MODEL, find_family, told.append)
    model = read_model(found)
    assert model.vision.tile == 16
    assert model.folders[1].name == found.path.name
    fetched = [Path(name).name for name in hub.fetched if name.startswith(MODEL)]
    assert sorted(fetched) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert fetched[-1] == "model.safetensors"
    assert [line.split(":")[0] for line in told] == [f"fetching {MODEL}"]


def test_what_is_in_the_cache_is_not_fetched_again(
    hub: SimulatedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = download(MODEL)
    before = list(hub.fetched)
    assert download(MODEL) == first
    assert hub.fetched == before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download(MODEL) == first
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE"):
        download(TOWER)


def test_a_download_that_broke_off_goes_on(
    hub: SimulatedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    name = f"{MODEL}/model.safetensors"
    hub.breaks.add(name)
    with contextlib.suppress(ExportError):  # Where the client does not go on by itself.
        download(MODEL)
    folder = download(MODEL)
    wanted = (hub.root / name).read_bytes()
    assert (folder / "model.safetensors").read_bytes() == wanted
    assert hub.resumed == [name]


def test_shards_are_those_of_the_index(hub: SimulatedHub) -> None:
    folder = hub.root / MODEL
    whole = folder / "model.safetensors"
    shutil.copy(whole, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    write_json(folder / "model.safetensors.index.json", index)
    download(MODEL)
    weights = [Path(name).name for name in hub.fetched if name.endswith(".safetensors")]
    assert weights == ["model-00001-of-00001.safetensors"]
    index["weight_map"]["b"] = "../../elsewhere.safetensors"
    write_json(folder / "model.safetensors.index.json", index)
    shutil.rmtree(folder.parent.parent.parent / "cache")
    with pytest.raises(ExportError, match=r"elsewhere\.safetensors.*does not hold"):
        download(MODEL)


def test_pickles_are_refused_before_anything_is_fetched(hub: SimulatedHub) -> None:
    for path in (hub.root / MODEL).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ExportError, match=r"pytorch_model\.bin.*refs/pr"):
        download(MODEL)
    (hub.root / MODEL / "pytorch_model.bin").unlink()
    with pytest.raises(ExportError, match="no safetensors"):
        download(MODEL)
    assert hub.fetched == []


def test_an_architecture_that_is_not_taken_costs_no_weights(hub: SimulatedHub) -> None:
    edit_json(hub.root / MODEL / "config.json", architectures=["MllamaForConditionalGeneration"])
    with pytest.raises(ExportError, match="cross attention"):
        find_checkpoint(MODEL, find_family)
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.usefixtures("hub")
def test_revisions_and_names() -> None:
    assert download(f"{MODEL}@v1") == download(MODEL)
    with pytest.raises(ExportError, match="check the revision"):
        download(f"{MODEL}@gone")
    with pytest.raises(ExportError, match="check the name"):
        download("owner/nothing")
    with pytest.raises(ExportError, match="neither"):
        download("a/b/c")


def test_a_token_is_sent_to_the_hub(hub: SimulatedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    download(MODEL)
    assert "Bearer hf_of_a_test" in hub.tokens


def test_export_of_a_hub_name(hub: SimulatedHub, tmp_path: Path) -> None:
    write_nano(hub.root / "owner/small")
    options = ExportOptions(revision="v1", parity=False)
    result = export_bundle("owner/small", tmp_path / "bundle", options)
    assert result.manifest.name == "small"
    assert result.manifest.source.name == "owner/small@v1"
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["family"] == "nano"
    with pytest.raises(ExportError, match="is a folder"):
        export_bundle(str(hub.root / "owner/small"), tmp_path / "other", options)
