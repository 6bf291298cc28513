"""Weights read by rows: every stored type, both file formats, bounded memory, damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrs_edge.errors import ExportError

pytest.importorskip("torch", reason="exporting needs the `export` extra")

import torch
from safetensors.torch import save_file

from lrs_edge_export.checkpoints import safetensors_file, tensors
from lrs_edge_export.checkpoints.renamed import Piece, Renamed
from lrs_edge_export.checkpoints.tensors import SafetensorsSource, TensorSource, TorchSource

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def written(folder: Path, state: dict[str, torch.Tensor], kind: str) -> TensorSource:
    if kind == "torch":
        torch.save(state, folder / "pytorch_model.bin")
        return TorchSource([folder / "pytorch_model.bin"])
    save_file(state, folder / "model.safetensors")
    return SafetensorsSource(dict.fromkeys(state, folder / "model.safetensors"))


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3), label="shape")
    dtype = data.draw(st.sampled_from(FLOATS), label="dtype")
    block = data.draw(st.integers(8, 100), label="bytes at once")
    # An integer tensor of odd size before it: offsets are not multiples of the item size.
    state = {
        "a": torch.zeros(3, dtype=torch.int8),
        "x": torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype),
        "y": torch.ones(2),
    }
    source = written(tmp_path_factory.mktemp("weights"), state, kind)
    wanted = state["x"].float().numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_BLOCK", block)
        patch.setattr(safetensors_file, "BLOCK", block)
        assert source.shape("x") == tuple(shape)
        found = source.read("x")
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        assert np.array_equal(found, wanted)
        if not shape:
            with pytest.raises(ValueError, match="no rows"):
                source.rows("x", 0, 0)
            return
        start = data.draw(st.integers(0, shape[0]), label="start")
        stop = data.draw(st.integers(start, shape[0]), label="stop")
        assert np.array_equal(source.rows("x", start, stop), wanted[start:stop])
        with pytest.raises(ValueError, match="no rows"):
            source.rows("x", 0, shape[0] + 1)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_what_cannot_be_read(tmp_path: Path, kind: str) -> None:
    state = {"whole": torch.ones(4, 2), "int": torch.ones(4, dtype=torch.int32)}
    state["inf"] = torch.tensor([[1.0], [torch.inf], [2.0]])
    state["huge"] = torch.tensor([1e300], dtype=torch.float64)
    source = written(tmp_path, state, kind)
    with pytest.raises(KeyError):
        source.rows("nowhere", 0, 1)
    with pytest.raises(ExportError, match="before it was quantized"):
        source.read("int")
    for name in ("inf", "huge"):
        with pytest.raises(ExportError, match=f"{name} holds values that are not finite"):
            source.read(name)
    assert source.rows("inf", 0, 1) == 1


def test_a_file_that_lacks_a_tensor_or_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100, 100)}, path)
    source = SafetensorsSource({"x": path, "y": path})
    with pytest.raises(ExportError, match="does not hold y"):
        source.shape("y")
    assert source.shape("x") == (100, 100)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ExportError, match="ends too early"):
        source.read("x")
    assert source.rows("x", 0, 50).all()
    path.unlink()
    with pytest.raises(ExportError, match="download it again"):
        source.read("x")


MEASURE = """
import sys
from pathlib import Path
from lrs_edge_export.checkpoints.renamed import Piece, Renamed
from lrs_edge_export.checkpoints.tensors import SafetensorsSource
from lrs_edge.requests.memory import peak_memory
path = Path(sys.argv[1])
source = SafetensorsSource({f"x{i}": path for i in range(16)})
source.read("x0")
before = peak_memory()
for i in range(1, 16):
    source.read(f"x{i}")
print(peak_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_pages_of_what_was_read_are_not_kept(tmp_path: Path) -> None:
    size = 4 << 20
    save_file(
        {f"x{i}": torch.ones(size // 2, dtype=torch.bfloat16) for i in range(16)}, tmp_path / "x"
    )
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # A mapped file would leave 15 tensors of 4 MiB resident.
    assert grown < 4 * size


def test_tensors_by_other_names_and_in_pieces(tmp_path: Path) -> None:
    fused = torch.arange(18.0).reshape(6, 3)
    state = {"old.qkv.weight": fused, "old.norm": torch.ones(2), "head": torch.zeros(1)}
    source = written(tmp_path, state, "safetensors")
    view = Renamed.by_rules(source, ((r"old\.(\w+)\.", r"new.\1_proj."), (r"old\.", "x.")))
    assert sorted(view.names()) == ["head", "new.qkv_proj.weight", "x.norm"]
    assert np.array_equal(view.read("new.qkv_proj.weight"), fused.numpy())
    pieces = Renamed(view, {"k": Piece("new.qkv_proj.weight", 2, 4), "n": "x.norm"})
    assert pieces.shape("k") == (2, 3)
    assert np.array_equal(pieces.read("k"), fused[2:4].numpy())
    assert np.array_equal(pieces.rows("k", 1, 2), fused[3:4].numpy())
    assert np.array_equal(pieces.rows("n", 0, 1), [1.0])
    with pytest.raises(KeyError):
        pieces.shape("head")
    with pytest.raises(ValueError, match="no rows"):
        pieces.rows("k", 1, 3)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    state = {"model.a": torch.ones(1), "a": torch.zeros(1)}
    source = written(tmp_path, state, "safetensors")
    with pytest.raises(ExportError, match=r"model\.a and a|a and model\.a"):
        Renamed.by_rules(source, ((r"model\.", ""),))
