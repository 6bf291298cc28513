"""Bundles whose hashes are right and whose maker is not honest: a BundleError, within seconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer, models

from lrs_edge.bundle.bundle import default_bundle_path, open_bundle, read_manifest, verify_bundle
from lrs_edge.bundle.tokenizer import check_tokenizer
from lrs_edge.commands.main import run
from lrs_edge.errors import BundleError
from lrs_edge.language.prompt import Prompt
from tests.test_bundle import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def put(bundle: Path, name: str, data: bytes, **values: Any) -> None:
    """Replace a file, and what the manifest says of it."""
    (bundle / name).write_bytes(data)
    path = bundle / "manifest.json"
    content = json.loads(path.read_text()) | values
    entry = {"role": "x", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["files"][name] = entry
    path.write_text(json.dumps(content))


def refused(bundle: Path, words: str) -> None:
    """Opening, verifying and `info` refuse the bundle, the commands with exit code 4."""
    with pytest.raises(BundleError, match=words) as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)
    assert run(["models", "verify", str(bundle)]) == BundleError.exit_code
    assert run(["info", str(bundle)]) == BundleError.exit_code


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("/dev/stdin"),
        lambda path: path.symlink_to(path.name),
        os.mkdir,
    ],
    ids=["pipe", "zero", "stdin", "itself", "folder"],
)
@pytest.mark.parametrize("name", ["manifest.json", "llm.onnx"])
def test_what_is_no_plain_file(bundle: Path, make: Callable[[Path], None], name: str) -> None:
    (bundle / name).unlink()
    make(bundle / name)
    refused(bundle, name)


def test_a_linked_folder_cannot_hide_files(bundle: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "llm.onnx.data").write_bytes(b"weights")
    (bundle / "sub").symlink_to(hidden)
    refused(bundle, "link to a folder")
    assert [check.path for check in verify_bundle(bundle) if check.problem] == ["sub"]


def test_a_linked_folder_inside_the_bundle_is_one_too(bundle: Path) -> None:
    (bundle / "real").mkdir()
    put(bundle, "real/x.data", b"x")
    open_bundle(bundle)
    (bundle / "sub").symlink_to("real")
    refused(bundle, "link to a folder")


def parts(
    prefix: str = "USER: ",
    suffix: str = "{question}",
    separator: int = 3,
    local: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A layout as it stands in a manifest."""
    return [
        {"part": "text", "text": prefix},
        {"part": "global_view"},
        {"part": "separator", "ids": [separator]},
        local or {"part": "local_rows"},
        {"part": "question", "text": suffix},
    ]


FOUND = {"part": "objects", "text": "{objects}"}
#: A layout whose global view comes after the local tokens.
VIEW_LAST = [
    {"part": "local_tiles"},
    {"part": "global_view"},
    {"part": "question", "text": "{question}"},
]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("vision", {"tile": 20_000}),
        ("vision", {"tile": 10**400}),
        ("vision", {"tile": -336}),
        ("vision", {"grid": 4000, "tile": 4000}),
        ("vision", {"local_pool": 0}),
        ("vision", {"local_pool": 2, "grid": 3}),
        ("vision", {"pooling": "nearest"}),
        ("llm", {"layers": 10**6}),
        ("llm", {"vocabulary": 0}),
        ("llm", {"heads": 1024, "kv_heads": 1, "head_dim": 1 << 16}),
        ("rfm", {"hidden": 64}),
        ("rfm", {"deepstack": 1}),
        ("llm", {"deepstack": -1}),
        ("llm", {"deepstack": 10**6}),
        ("search", {"base_side": 10**9}),
        ("search", {"keep_ratio": -1}),
        ("limits", {"max_length": 1 << 40}),
        ("prompt", {"parts": parts(suffix="{question}" * 1000)}),
        ("prompt", {"parts": parts(suffix="{question}{question}")}),
        ("prompt", {"parts": parts(suffix="{question}" + "x" * 5000)}),
        ("prompt", {"parts": parts(suffix="no place for it")}),
        ("prompt", {"parts": parts(prefix="x" * 5000)}),
        ("prompt", {"parts": parts(prefix="{question}")}),
        ("prompt", {"parts": parts(separator=-1)}),
        ("prompt", {"parts": parts(separator=10**30)}),
        ("prompt", {"parts": parts()[::-1]}),
        ("prompt", {"parts": parts()[:-1]}),
        ("prompt", {"parts": parts() * 2}),
        ("prompt", {"parts": [{"part": "text", "text": "a"}] * 100 + parts()}),
        ("prompt", {"parts": [*parts(), {"part": "separator", "ids": [1]}]}),
        ("prompt", {"parts": [{"part": "video"}, *parts()]}),
        ("prompt", {"parts": parts(local={"part": "local_tiles", "before": "x" * 5000})}),
        ("prompt", {"parts": parts(local={"part": "local_rows", "end": 1})}),
        ("prompt", {"parts": parts(local={"part": "local_tiles", "row": "x" * 5000})}),
        ("prompt", {"parts": parts(local={"part": "local_tiles", "end": "x" * 5000})}),
        ("prompt", {"parts": parts(local={"part": "local_tiles", "most": -1})}),
        ("prompt", {"parts": parts(local={"part": "local_tiles", "most": 1 << 40})}),
        ("prompt", {"parts": VIEW_LAST, "position_axes": 3}),
        ("prompt", {"parts": [VIEW_LAST[0], FOUND, *VIEW_LAST[1:]]}),
        ("prompt", {"position_axes": 3}),
        ("prompt", {"position_axes": 2, "parts": parts(local={"part": "local_tiles"})}),
        ("prompt", {"position_axes": 10**9, "parts": parts(local={"part": "local_tiles"})}),
        ("prompt", {"stop_texts": [""]}),
        ("prompt", {"image_token": "x" * 5000}),
        ("prompt", {"stop_ids": [10]}),
        ("prompt", {"stop_ids": [1] * 1000}),
    ],
)
def test_values_that_no_model_has(bundle: Path, part: str, values: dict[str, Any]) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content[part] |= values
    path.write_text(json.dumps(content))
    refused(bundle, r"manifest\.json")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "-0.0", "null", '"1"'])
@pytest.mark.parametrize("name", ["repetition_penalty", "keep_ratio"])
def test_numbers_that_are_none(bundle: Path, name: str, text: str) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    place = content["search"] if name == "keep_ratio" else content
    place[name] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', text))
    refused(bundle, r"manifest\.json")


YES_NO = {"yes_ids": [1, 2], "no_ids": [3], "threshold": 0.5, "slope": 1.0, "intercept": -0.5}
COVARIANCE = [[1.0 if row == col else 0.5 for col in range(6)] for row in range(6)]
COLOURS = {"mean": [0.5] * 6, "covariance": COVARIANCE, "limit": 4.0}


def put_calibration(bundle: Path, calibration: object, text: str = "") -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text()) | {"calibration": calibration}
    path.write_text(json.dumps(content).replace('"HERE"', text))


def test_a_calibration_passes(bundle: Path) -> None:
    domain = {"resolutions": [[0.1, 10]], "colours": COLOURS}
    put_calibration(
        bundle, {"yes_no": YES_NO, "open": {"intercept": 1, "mean_slope": 2}, "domain": domain}
    )
    opened = open_bundle(bundle).manifest.calibration
    assert opened is not None
    assert opened.domain is not None
    assert opened.domain.resolutions == ((0.1, 10.0),)


@pytest.mark.parametrize(
    "calibration",
    [
        3,
        {"yes_no": {"threshold": 0}},
        {"yes_no": YES_NO | {"yes_ids": []}},
        {"yes_no": YES_NO | {"yes_ids": [10]}},
        {"yes_no": YES_NO | {"no_ids": [-1]}},
        {"yes_no": YES_NO | {"no_ids": [10**30]}},
        {"yes_no": YES_NO | {"no_ids": [3] * 1000}},
        {"yes_no": YES_NO | {"no_ids": [2]}},
        {"yes_no": YES_NO | {"threshold": 1e300}},
        {"yes_no": YES_NO | {"slope": -0.1}},
        {"yes_no": YES_NO | {"intercept": -1e5}},
        {"open": {"intercept": 1e5, "mean_slope": 1}},
        {"open": {"intercept": 0, "mean_slope": -1}},
        {"open": {"intercept": 0, "mean_slope": 1, "least_slope": 1e9}},
        {"domain": {"resolutions": [[1]]}},
        {"domain": {"resolutions": [[2, 1]]}},
        {"domain": {"resolutions": [[0, 1]]}},
        {"domain": {"resolutions": [[1, 1e300]]}},
        {"domain": {"resolutions": [[1, 2]] * 1000}},
        {"domain": {"colours": COLOURS | {"mean": [0.5] * 5}}},
        {"domain": {"colours": COLOURS | {"mean": [1e300] * 6}}},
        {"domain": {"colours": COLOURS | {"limit": 0}}},
        {"domain": {"colours": COLOURS | {"covariance": COVARIANCE[:5]}}},
        {"domain": {"colours": COLOURS | {"covariance": [[1.0] * 6] * 6}}},
        {"domain": {"colours": COLOURS | {"covariance": [[0.0] * 6] * 6}}},
        {"domain": {"colours": COLOURS | {"covariance": [[0, *[1.0] * 5], *COVARIANCE[1:]]}}},
        {"domain": {"colours": COLOURS | {"covariance": [[1e300] * 6] * 6}}},
        {"questions": -1},
        {"calibration_error": 2},
    ],
)
def test_calibrations_that_no_fit_gives(bundle: Path, calibration: object) -> None:
    put_calibration(bundle, calibration)
    refused(bundle, r"manifest\.json")


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", '"1"'])
@pytest.mark.parametrize(
    "calibration",
    [
        {"yes_no": YES_NO | {"threshold": "HERE"}},
        {"yes_no": YES_NO | {"slope": "HERE"}},
        {"open": {"intercept": "HERE", "mean_slope": 1}},
        {"domain": {"resolutions": [["HERE", 1]]}},
        {"domain": {"colours": COLOURS | {"limit": "HERE"}}},
        {"domain": {"colours": COLOURS | {"covariance": [["HERE"] * 6] * 6}}},
    ],
)
def test_calibrations_of_numbers_that_are_none(
    bundle: Path, calibration: object, text: str
) -> None:
    put_calibration(bundle, calibration, text)
    refused(bundle, r"manifest\.json")


def raw(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header(**values: Any) -> dict[str, Any]:
    found = {
        "embed_tokens": {"dtype": "F16", "shape": [10, 32], "data_offsets": [0, 640]},
        "image_newline": {"dtype": "F16", "shape": [32], "data_offsets": [640, 704]},
    }
    return found | values


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        raw(b"[" * 10_000, b""),
        raw([], bytes(704)),
        raw({}, bytes(704)),
        raw(header(), bytes(703)),
        raw(header(), bytes(705)),
        raw(header(more={"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}), bytes(704)),
        raw(header(image_newline={"dtype": "F16", "shape": [32], "data_offsets": [0, 64]}), b""),
        raw(header(image_newline=3), bytes(704)),
        raw(header(image_newline={"dtype": "F16", "shape": [32], "data_offsets": [[], {}]}), b""),
        save({"embed_tokens": np.ones((10, 31), "f2"), "image_newline": np.ones(32, "f2")}),
        save({"embed_tokens": np.ones(10, "f2"), "image_newline": np.ones(32, "f2")}),
        save({"embed_tokens": np.ones((10, 32), "f8"), "image_newline": np.ones(32, "f2")}),
        save({"embed_tokens": np.ones((10, 32), "i2"), "image_newline": np.ones(32, "f2")}),
        save({"embed_tokens": np.ones((10, 32), "f2")}),
        raw(json.dumps(header()).replace('"F16"', '"BF16"').encode(), bytes(704)),
    ],
)
def test_embeddings(bundle: Path, data: bytes) -> None:
    put(bundle, "embeddings.safetensors", data)
    refused(bundle, r"embeddings\.safetensors")


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10_000}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "▁"}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": []}],
            }
        },
        {"normalizer": {"type": "NFKD"}},
        {"normalizer": [1]},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "invert": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 3}},
        {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
        {"decoder": {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 0}},
        {"decoder": {"type": "Replace", "pattern": {"String": " "}, "content": "x" * 10_000}},
        {"post_processor": {"type": "BertProcessing", "sep": ["a", 0], "cls": ["a", 0]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
        {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "a"}},
        {"model": BPE | {"vocab": {}}},
        {"model": BPE | {"vocab": []}},
        {"model": BPE | {"vocab": {"a": -1}, "merges": []}},
        {"model": BPE | {"vocab": {"a": 1.5}, "merges": []}},
        {"model": BPE | {"vocab": {"a": True}, "merges": []}},
        {"model": BPE | {"vocab": {"a": 1 << 40}, "merges": []}},
        {"model": BPE | {"vocab": {"a": 0, "b": 0}, "merges": []}},
        {"model": BPE | {"vocab": {"a" * 5000: 0}, "merges": []}},
        {"model": BPE | {"merges": ["b a"]}},
        {"model": BPE | {"merges": [["a", 3]]}},
        {"model": BPE | {"merges": None}},
        {"model": BPE | {"dropout": 0.5}},
        {"model": BPE | {"unk_token": "none of them"}},
        {"model": BPE | {"other": 1}},
        {"model": "BPE"},
        {"added_tokens": [{"id": 1 << 40, "content": "x"}]},
        {"added_tokens": [{"id": 3, "content": ""}]},
        {"added_tokens": [{"id": 3, "content": "x" * 10_000}]},
        {"added_tokens": [{"id": 3, "content": "x"}] * 20_000},
        {"padding": {"strategy": {"Fixed": 1 << 40}}},
        {"other": 1},
    ],
)
def test_tokenizers(bundle: Path, changes: dict[str, Any]) -> None:
    content = {"version": "1.0", "model": BPE} | changes
    put(bundle, "tokenizer.json", json.dumps(content).encode())
    refused(bundle, r"tokenizer\.json")
    with pytest.raises(BundleError):
        Prompt(bundle / "tokenizer.json", read_manifest(bundle).prompt, 10)


def test_tokenizers_of_supported_families_pass(tmp_path: Path) -> None:
    check_tokenizer(default_bundle_path() / "tokenizer.json")
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(path))
    check_tokenizer(path)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b"null", b"{}", b'{"model": 3}'])
def test_tokenizers_that_are_none(bundle: Path, data: bytes) -> None:
    put(bundle, "tokenizer.json", data)
    refused(bundle, r"tokenizer\.json")
