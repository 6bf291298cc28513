"""The embeddings file: the library's bytes, types, and memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

pytest.importorskip("torch", reason="exporting needs the `export` extra")

from lrs_edge_export.bundle import embeddings
from lrs_edge_export.bundle.embeddings import write_embeddings
from lrs_edge_export.checkpoints.rows import Rows, first_rows
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors


def table_on_disk(folder: Path, values: np.ndarray, rows: int) -> Rows:
    folder.mkdir(exist_ok=True)
    save_file({"embed_tokens.weight": values}, folder / "model.safetensors")
    tensors = Scoped(open_tensors(folder), "")
    return first_rows(tensors, "embed_tokens.weight", rows, values.shape[1])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    exact=st.lists(st.booleans(), min_size=3, max_size=3),
    rounded=st.booleans(),
    chunk=st.integers(1, 60),
)
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    width: int,
    exact: list[bool],
    rounded: bool,
    chunk: int,
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(rows)
    shapes = {"embed_tokens": (rows, width), "image_newline": (width,), "b": (2, width)}
    tables, wanted = {}, {}
    for (name, shape), half in zip(shapes.items(), exact, strict=True):
        values = rng.standard_normal(shape).astype(np.float32)
        if half:
            values = values.astype(np.float16).astype(np.float32)
        lossless = np.array_equal(values, values.astype(np.float16))
        tables[name] = values
        wanted[name] = values.astype(np.float16) if lossless or rounded else values
    more = np.concatenate([tables["embed_tokens"], np.full((3, width), 7e7, np.float32)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "_CHUNK_VALUES", chunk)
        from_disk = tables | {"embed_tokens": table_on_disk(folder, more, rows)}
        write_embeddings(folder / "embeddings.safetensors", from_disk, rounded=rounded)
    assert (folder / "embeddings.safetensors").read_bytes() == save(wanted)


def test_what_does_not_fit_float16_stays(tmp_path: Path) -> None:
    tables = {"embed_tokens": np.array([[1.0], [1e6]], np.float32)}
    write_embeddings(tmp_path / "file", tables, rounded=True)
    assert load_file(tmp_path / "file")["embed_tokens"].tolist() == [[1.0], [1e6]]


def test_a_table_is_never_whole_in_memory(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((200_000, 64)).astype(np.float32)
    table, size = table_on_disk(tmp_path / "checkpoint", values, 200_000), values.nbytes
    del values
    tracemalloc.start()
    try:
        write_embeddings(tmp_path / "file", {"embed_tokens": table}, rounded=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > size // 2
    # A chunk as float32 and float16, and the block it is read from.
    assert peak < 40 << 20 < size


def test_rows_of_a_table(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    table = table_on_disk(tmp_path / "checkpoint", values, 17)
    assert table.shape == (17, 3)
    assert np.array_equal(table(), values[:17])
    assert np.array_equal(table[[16, 0, 16]], values[[16, 0, 16]])
    assert np.array_equal(np.concatenate(list(table.chunks(5))), values[:17])
    for place in (17, -1):
        with pytest.raises(IndexError, match="no row"):
            table[[place]]
