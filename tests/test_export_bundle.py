"""Whole exports: what lies in a bundle, determinism, precision, targets, recipes, the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lrs_edge
from lrs_edge.bundle.bundle import Embeddings, open_bundle, verify_bundle
from lrs_edge.commands.main import run
from lrs_edge.errors import ExportError
from tests.checkpoints import edit_json, write_nano, write_qwen

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

import onnx

from lrs_edge_export import ExportOptions, Precisions, export_bundle
from lrs_edge_export.families import recipes
from lrs_edge_export.families.llava_llama import VICUNA_V1
from lrs_edge_export.families.llava_qwen import QWEN_1_5
from lrs_edge_export.parity import check as parity

NO_PARITY = ExportOptions(parity=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("checkpoints") / "tiny-qwen")


def test_a_bundle_is_complete(qwen: Path, tmp_path: Path) -> None:
    result = export_bundle(str(qwen), tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest == result.manifest
    assert not [check for check in verify_bundle(bundle.path) if check.problem]
    listed = set(manifest.files) | {"manifest.json"}
    assert {path.name for path in bundle.path.iterdir()} == listed
    assert (manifest.name, manifest.family) == ("tiny-qwen", "llava_qwen")
    assert manifest.source.name == "tiny-qwen"
    assert [stage.stage for stage in manifest.parity.stages] == ["vision", "rfm", "llm", "pipeline"]
    assert manifest.parity.passed
    assert manifest.parity.stage("rfm").value("top-k overlap") == 1.0
    assert manifest.parity.stage("llm").value("relative error") < 1e-4
    Embeddings(bundle.file(manifest.embeddings), 64, manifest.llm.vocabulary)
    card = (bundle.path / "MODEL_CARD.md").read_text()
    for word in ("tiny-qwen", "greedy agreement", "not stated", "llm.onnx.data"):
        assert word in card


def test_graphs_have_the_contract_s_inputs_and_outputs(qwen: Path, tmp_path: Path) -> None:
    export_bundle(str(qwen), tmp_path / "bundle", NO_PARITY)

    def shapes(values: object) -> dict[str, tuple[object, ...]]:
        return {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in values
        }

    def graph(name: str) -> onnx.GraphProto:
        model = onnx.load(tmp_path / "bundle" / name, load_external_data=False)
        onnx.checker.check_model(str(tmp_path / "bundle" / name))
        external = [t for t in model.graph.initializer if t.external_data]
        assert {t.external_data[0].value for t in external} == {
            name.replace("_masked", "") + ".data"
        }
        return model.graph

    buffers = {f"{part}_{i}": (1, 2, "S", 16) for i in range(2) for part in ("key", "value")}
    buffers["key_2"] = (1, 2, "S", 16)
    common = {"inputs_embeds": (1, "L", 64), "position_ids": (1, "L"), "past_length": (1,)}
    past = {f"past_{name}": shape for name, shape in buffers.items()}
    present = {f"present_{name}": shape for name, shape in buffers.items()}
    rfm, masked, llm = graph("rfm.onnx"), graph("rfm_masked.onnx"), graph("llm.onnx")
    assert shapes(rfm.input) == common | past
    assert shapes(rfm.output) == {"logits": (4, "T")} | present
    assert shapes(masked.input) == common | past | {"attention_bias": (1, 1, "L", "T")}
    assert shapes(masked.output) == shapes(rfm.output)
    assert set(shapes(llm.input)) == set(common) | {
        f"past_{part}_{i}" for i in range(3) for part in ("key", "value")
    }
    assert shapes(llm.output)["logits"] == (1, 259)
    vision = graph("vision.onnx")
    assert shapes(vision.input) == {"pixel_values": ("N", 3, 16, 16)}
    assert shapes(vision.output) == {"tokens": ("N", 16, 64)}


def test_the_same_checkpoint_gives_the_same_bytes(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    for name in ("one", "two"):
        export_bundle(str(qwen), tmp_path / name, NO_PARITY)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert open_bundle(tmp_path / "one").manifest.created == "2001-09-09T01:46:40Z"


def test_the_source_hash_covers_weights_tower_and_settings(tmp_path: Path) -> None:
    folder, seen = write_qwen(tmp_path / "checkpoint"), set()

    def export() -> None:
        target = tmp_path / f"bundle{len(seen)}"
        seen.add(export_bundle(str(folder), target, NO_PARITY).manifest.source.sha256)

    export()
    edit_json(folder / "config.json", comment="other")
    export()
    edit_json(folder / "tower" / "config.json", comment="other")
    export()
    assert len(seen) == 3


def test_a_bundle_for_cuda_has_a_fused_tower(qwen: Path, tmp_path: Path) -> None:
    """Of a transformer; the usual graph stays for the CPU, and both share their weights."""
    nano = write_nano(tmp_path / "nano")
    for checkpoint, names in (
        (qwen, ["vision.onnx", "vision_fused.onnx"]),
        (nano, ["vision.onnx"]),
    ):
        target = tmp_path / f"{checkpoint.name}-cuda"
        options = ExportOptions(parity=False, target="cuda")
        manifest = export_bundle(str(checkpoint), target, options).manifest
        assert [file.path for file in manifest.vision.graphs] == names
        assert sorted(n for n, f in manifest.files.items() if f.role == "vision") == [
            *names[:1], "vision.onnx.data", *names[1:],
        ]  # fmt: skip
        with lrs_edge.load(target, provider="cpu") as engine:
            assert engine.provider == "cpu"


def test_int8_keeps_large_weights_as_integers(tmp_path: Path) -> None:
    folder = write_nano(tmp_path / "checkpoint")
    sizes = {}
    for precision in ("fp32", "int8-weight"):
        target = tmp_path / precision
        options = ExportOptions(precisions=Precisions.all(precision), parity=False)
        manifest = export_bundle(str(folder), target, options).manifest
        assert {manifest.vision.precision, manifest.rfm.precision, manifest.llm.precision} == {
            precision
        }
        sizes[precision] = manifest.files["vision.onnx.data"].size
    assert sizes["int8-weight"] < 0.4 * sizes["fp32"]
    graph = onnx.load(tmp_path / "int8-weight" / "vision.onnx", load_external_data=False).graph
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) > 10


def test_int8_agrees_with_pytorch_on_a_golden_checkpoint(tmp_path: Path) -> None:
    from tests.golden_data import checkpoint

    source = checkpoint("llama")
    if source is None:
        pytest.skip("the golden checkpoint of llama is not here")
    options = ExportOptions(precisions=Precisions.all("int8-weight"))
    report = export_bundle(str(source), tmp_path / "bundle", options).manifest.parity
    assert report.stage("llm").value("cosine") > 0.99
    assert report.stage("rfm").value("top-k overlap") > 0.9


def test_embeddings_are_halved_only_without_loss(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_qwen(tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] += np.float32(1e-5)
    save_file(weights, folder / "model.safetensors")
    kinds = {}
    for precision in ("fp32", "int8-weight"):
        options = ExportOptions(precisions=Precisions.all(precision), parity=False)
        export_bundle(str(folder), tmp_path / precision, options)
        tables = load_file(tmp_path / precision / "embeddings.safetensors")
        kinds[precision] = (tables["embed_tokens"].dtype, tables["image_newline"].dtype)
    assert kinds["fp32"] == (np.float32, np.float16)
    assert kinds["int8-weight"] == (np.float16, np.float16)


def test_a_failed_parity_check_leaves_nothing(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = parity.Limits(error=-1.0, cosine=0.5, overlap=0.5, greedy=0.5)
    monkeypatch.setitem(parity.LIMITS, "fp32", limits)
    with pytest.raises(ExportError, match=r"parity check failed: vision relative error"):
        export_bundle(str(qwen), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_targets(qwen: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    export_bundle(str(qwen), target, NO_PARITY)
    with pytest.raises(ExportError, match="--force"):
        export_bundle(str(qwen), target, NO_PARITY)
    (target / "extra").touch()
    forced = ExportOptions(parity=False, force=True)
    export_bundle(str(qwen), target, forced)
    assert not (target / "extra").exists()
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    export_bundle(str(qwen), foreign, NO_PARITY)  # An empty directory is no obstacle.
    (foreign / "manifest.json").unlink()
    with pytest.raises(ExportError, match="not a bundle"):
        export_bundle(str(qwen), foreign, forced)
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="not a directory"):
        export_bundle(str(qwen), tmp_path / "file", forced)


def test_a_failed_swap_restores_the_old_bundle(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    export_bundle(str(qwen), target, NO_PARITY)
    rename = Path.rename

    def fail_for_new(self: Path, to: Path) -> Path:
        if self.name == "new" and self != target:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(ExportError, match="No space left"):
        export_bundle(str(qwen), target, ExportOptions(parity=False, force=True))
    open_bundle(target)


def test_parity_images(qwen: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ExportOptions(parity_images=tmp_path / "images")
    with pytest.raises(ExportError, match="not a folder"):
        export_bundle(str(qwen), tmp_path / "bundle", options)
    (tmp_path / "images").mkdir()
    with pytest.raises(ExportError, match="no images"):
        export_bundle(str(qwen), tmp_path / "bundle", options)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    manifest = export_bundle(str(qwen), tmp_path / "bundle", options).manifest
    assert manifest.parity.images == "1 images of images"
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    with pytest.raises(ExportError, match=r"b\.png"):
        export_bundle(str(qwen), tmp_path / "other", options)


def test_recipes(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    found = recipes.all_recipes()
    authors = [recipe for recipe in found if recipe.checkpoint.startswith("ll-13/")]
    assert {recipe.template for recipe in authors} == {"qwen_1_5", "vicuna_v1"}
    assert all(recipe.taken for recipe in authors)
    assert len({recipe.name for recipe in found}) == len(found)
    assert QWEN_1_5.suffix.count("{question}") == VICUNA_V1.suffix.count("{question}") == 1
    assert recipes.find_recipe("LL-13/llava-largeimg-qwen2-7b") is not None
    assert recipes.find_recipe("unknown") is None

    places = {"ll-13/llava-largeimg-Qwen2-7B": qwen, "openai/clip-vit-large-patch14-336": None}

    def fetch(name: str, **_: object) -> str:
        return str(places[name] or qwen / "tower")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    manifest = export_bundle("llava-largeimg-qwen2-7b", tmp_path / "bundle", NO_PARITY).manifest
    assert manifest.source.name == "ll-13/llava-largeimg-Qwen2-7B"
    assert manifest.name == "llava-largeimg-Qwen2-7B"
    assert "see the checkpoint's page" in manifest.licence
    places["ll-13/llava-largeimg-Vicuna-7B"] = qwen
    with pytest.raises(ExportError, match=r"LlavaQwenForCausalLM.*is for LlavaLlamaForCausalLM"):
        export_bundle("llava-largeimg-vicuna-7b", tmp_path / "other", NO_PARITY)


def test_the_command(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "bundle")
    arguments = ["export", str(qwen), "-o", target, "--name", "mine", "--licence", "CC0-1.0"]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "greedy agreement" in shown.out
    assert "comparing with PyTorch" in shown.err
    manifest = open_bundle(target).manifest
    assert (manifest.name, manifest.licence) == ("mine", "CC0-1.0")

    assert run(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert run([*arguments, "--force", "--no-parity", "-q"]) == 0
    shown = capsys.readouterr()
    assert "not checked" in shown.out
    assert not shown.err
    assert run(["export", str(tmp_path / "nowhere"), "-o", target, "--force"]) == 1
    assert "neither a folder" in capsys.readouterr().err
