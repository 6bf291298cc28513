"""What `export` and `distill` say of checkpoints that they cannot read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lrs_edge.errors import ExportError
from tests.checkpoints import tower_weights, write_qwen

NO_TORCH = (
    'import sys; sys.modules["torch"] = None; from lrs_edge.commands.main import main; main()'
)


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("distill", "nowhere", "is neither a folder, nor a recipe"),
        ("export", "nowhere", "is neither a folder, nor a recipe"),
        ("export", "empty", "holds no config.json"),
        ("export", "file", "is a file"),
        ("export", "damaged", "is not JSON"),
    ],
)
def test_the_folder_is_looked_at_before_packages_are_asked_for(
    command: str, name: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    options = ["--data", str(tmp_path)] if command == "distill" else []
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, command, name, "-o", "out", *options],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "torch" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "check the name"),
        ("LocalEntryNotFoundError", "HF_HUB_OFFLINE"),
        ("OfflineModeIsEnabled", "unset HF_HUB_OFFLINE"),
    ],
)
def test_all_that_the_hub_says_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, advice: str
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs the `export` extra")
    errors = pytest.importorskip("huggingface_hub.errors")
    from lrs_edge_export.checkpoints.checkpoint import find_checkpoint

    error_type = getattr(errors, kind)
    # Whatever arguments its constructor takes.
    error = error_type.__new__(error_type)
    said = f"403 Forbidden\n\n{'x' * 400} the last words"
    monkeypatch.setattr(error_type, "__str__", lambda _: said)

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ExportError, match=r"403 Forbidden x+ the last words \(") as caught:
        find_checkpoint("owner/model")
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tower_that_transformers_5_wrote(tmp_path: Path) -> None:
    """Its names have no `vision_model.` in front: nothing of it is missing."""
    read_model, find_checkpoint, save_file = _reading()
    folder = write_qwen(tmp_path / "checkpoint")
    before = read_model(find_checkpoint(str(folder))).vision.tower.tensors
    weights = {name.removeprefix("vision_model."): v for name, v in tower_weights().items()}
    assert "embeddings.class_embedding" in weights
    save_file(weights, folder / "tower" / "model.safetensors")
    tower = read_model(find_checkpoint(str(folder))).vision.tower.tensors
    name = "encoder.layers.0.mlp.fc1.weight"
    assert (tower.read(name) == weights[name]).all()
    assert sorted(tower.names()) == sorted(before.names())


def test_a_tower_of_an_unknown_layout_is_not_to_be_downloaded_again(tmp_path: Path) -> None:
    read_model, find_checkpoint, save_file = _reading()
    folder = write_qwen(tmp_path / "checkpoint")
    weights = {f"trunk.{name}": value for name, value in tower_weights().items()}
    save_file(weights, folder / "tower" / "model.safetensors")
    with pytest.raises(ExportError, match=r"its names are such as trunk\.") as caught:
        read_model(find_checkpoint(str(folder)))
    assert "download" not in str(caught.value)
    assert "more" not in str(caught.value)


def _reading():  # type: ignore[no-untyped-def]
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from safetensors.numpy import save_file

    from lrs_edge_export.checkpoints.checkpoint import find_checkpoint
    from lrs_edge_export.families.registry import read_model

    return read_model, find_checkpoint, save_file
