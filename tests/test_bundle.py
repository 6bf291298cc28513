"""The bundle on disk is untrusted: every way it can be wrong is one clear BundleError."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from lrs_edge.bundle.bundle import Embeddings, open_bundle, verify_bundle
from lrs_edge.bundle.layout import PromptSpec, rows_layout
from lrs_edge.bundle.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Limits,
    Manifest,
    SearchSpec,
    Source,
)
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.errors import BundleError
from tests.specs import decoder_spec, vision_spec

#: An ONNX model of IR version 8 and opset 23 whose graph, named by one letter, is empty.
GRAPH = b"\x08\x08\x3a\x03\x12\x01%b\x42\x02\x10\x17"

CONTENT = {
    "vision.onnx": GRAPH % b"v",
    "rfm.onnx": GRAPH % b"r",
    "llm.onnx": GRAPH % b"l",
    "embeddings.safetensors": save(
        {"embed_tokens": np.ones((10, 32), "f2"), "image_newline": np.ones(32, "f2")}
    ),
    "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
}


def write_bundle(root: Path) -> Path:
    root.mkdir()
    for name, data in CONTENT.items():
        (root / name).write_bytes(data)
    files = {
        name: FileEntry("part", len(data), hashlib.sha256(data).hexdigest())
        for name, data in CONTENT.items()
    }
    decoder = decoder_spec("rfm.onnx", 1, 4, 2, 8, 32)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        family="llava_llama",
        licence="Apache-2.0",
        source=Source("none", "0" * 64),
        created="2026-11-23",
        tools={},
        files=files,
        vision=vision_spec("vision.onnx", 336, 24, 2),
        rfm=decoder,
        llm=decoder_spec("llm.onnx", 2, 4, 2, 8, 32, vocabulary=10),
        prompt=PromptSpec(rows_layout("USER: ", "{question} ASSISTANT:", separator_id=3), (2,)),
        search=SearchSpec(1008),
        limits=Limits(2048, 4096),
        embeddings="embeddings.safetensors",
        tokenizer="tokenizer.json",
        exact_integers=True,
    )
    (root / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return root


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def change(bundle: Path, **values: Any) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def test_a_sound_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.name == "tiny"
    assert opened.file("llm.onnx") == bundle / "llm.onnx"
    assert [check.problem for check in verify_bundle(bundle)] == [""] * len(CONTENT)


@pytest.mark.parametrize("name", CONTENT)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name}.*missing"):
        open_bundle(bundle)


def test_an_altered_file_is_named(bundle: Path) -> None:
    (bundle / "rfm.onnx").write_bytes(GRAPH % b"R")
    with pytest.raises(BundleError, match=r"rfm.onnx.*SHA-256"):
        open_bundle(bundle)
    problems = {check.path: check.problem for check in verify_bundle(bundle)}
    assert [name for name, problem in problems.items() if problem] == ["rfm.onnx"]


def test_a_cut_file_is_found_without_hashing(bundle: Path) -> None:
    (bundle / "llm.onnx").write_bytes(b"ll")
    with pytest.raises(BundleError, match="2 bytes"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize(
    "name", ["../x", "x\n", ".", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "", "a\0b"]
)
def test_paths_stay_inside(bundle: Path, name: str) -> None:
    change(bundle, files={name: {"role": "x", "size": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="not inside"):
        open_bundle(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENT["rfm.onnx"])
    (bundle / "rfm.onnx").unlink()
    (bundle / "rfm.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="out of the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("version", [0, 3, 2.0, True, "2", None])
def test_another_schema_version_is_refused(bundle: Path, version: object) -> None:
    change(bundle, schema_version=version)
    with pytest.raises(BundleError, match="schema version"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "[" * 100_000, '{"schema_version": 1}', '{"schema_version": 2}', "NaN"],
)
def test_a_broken_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(bundle)


def test_a_huge_manifest_is_not_read(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BundleError, match="larger"):
        open_bundle(bundle)


def test_a_file_that_the_manifest_names_but_does_not_list_is_refused(bundle: Path) -> None:
    change(bundle, tokenizer="other.json")
    with pytest.raises(BundleError, match=r"other\.json"):
        open_bundle(bundle)


def test_a_file_that_nobody_vouches_for_is_refused(bundle: Path) -> None:
    (bundle / "sub").mkdir()
    (bundle / "sub" / "llm.onnx.data").write_bytes(b"weights")
    with pytest.raises(BundleError, match="not listed"):
        open_bundle(bundle)
    assert verify_bundle(bundle)[-1].problem == "the file is not listed in the manifest"


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision", {"tile": 0}),
        ("vision", {"grid": 25}),
        ("vision", {"flops": -1}),
        ("vision", {"flops": 10**30}),
        ("vision", {"tower": {"graph": "vision.onnx", "projector": "p.onnx", "flops": 10**30}}),
        ("llm", {"intermediate": 1 << 30}),
        ("vision", {"std": [0.0, 1.0, 1.0]}),
        ("llm", {"heads": 3}),
        ("llm", {"hidden": 1 << 30}),
        ("search", {"keep_ratio": 2.0}),
        ("search", {"base_side": 10}),
        ("limits", {"max_length": 0}),
        ("limits", {"max_length": 100}),
        ("prompt", {"parts": [{"part": "question", "text": "{question}"}]}),
        ("prompt", {"position_axes": 3}),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    bundle: Path, part: str, values: dict[str, Any]
) -> None:
    content = json.loads((bundle / "manifest.json").read_text())
    change(bundle, **{part: content[part] | values})
    with pytest.raises(BundleError, match="do not fit together"):
        open_bundle(bundle)


def test_a_directory_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)


def test_embeddings_are_looked_up_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.safetensors"
    table = np.arange(20, dtype=np.float16).reshape(5, 4)
    save_file({"embed_tokens": table, "image_newline": np.ones(4, np.float16)}, str(path))
    embeddings = Embeddings(path, hidden=4, vocabulary=5)
    assert np.array_equal(embeddings.lookup(np.array([3, 0, 3])), table[[3, 0, 3]])
    assert embeddings.newline.dtype == np.float32
    with pytest.raises(BundleError, match="manifest says"):
        Embeddings(path, hidden=4, vocabulary=6)


def test_damaged_embeddings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(BundleError, match="cannot be read"):
        Embeddings(path, hidden=4, vocabulary=5)


def test_a_graph_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llm.onnx"
    path.write_bytes(b"not a graph" * 10)
    with pytest.raises(BundleError, match=r"llm\.onnx is (no|not an) ONNX graph"):
        OnnxGraph.load(path, BackendOptions("cpu"))
