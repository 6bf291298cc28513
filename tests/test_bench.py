"""`lrs-edge bench` on a tiny bundle: what is counted, what is written, what is refused."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from lrs_edge.benchmarking.floor import weight_bytes
from lrs_edge.benchmarking.loading import measure_load
from lrs_edge.benchmarking.run import STAGES, Benchmark, BenchOptions, run_bench
from lrs_edge.benchmarking.tables import records, to_csv, to_json, to_markdown
from lrs_edge.bundle.bundle import Bundle, default_bundle_path, open_bundle
from lrs_edge.bundle.manifest import Flavour
from lrs_edge.commands.bench import _STAGES
from lrs_edge.commands.main import run
from lrs_edge.engines.metered import GraphWork
from lrs_edge.errors import BackendError
from lrs_edge.evaluation.flops import graph_costs
from tests.checkpoints import write_nano
from tests.rasters import noise, write

pytest.importorskip("torch", reason="exporting needs the `export` extra")
pytest.importorskip("onnx", reason="exporting needs the `export` extra")

from lrs_edge_export import ExportOptions, export_bundle

PROMPT, DEPTH, COUNT, TILES = 24, 20, 3, 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    export_bundle(str(write_nano(folder / "nano")), folder / "bundle", ExportOptions(parity=False))
    return folder / "bundle"


@pytest.fixture(scope="module")
def measured(bundle: Path) -> Benchmark:
    options = BenchOptions(
        prompts=(8, PROMPT),
        generated=(COUNT,),
        depths=(0, DEPTH),
        tiles=TILES,
        repetitions=2,
        device="cpu",
        threads=1,
        peak_seconds=0.01,
    )
    steps: list[str] = []
    found = run_bench(bundle, options, steps.append)
    assert any("synthetic image" in step for step in steps)
    return found


def test_every_stage_has_its_rows(measured: Benchmark) -> None:
    stages = [row["stage"] for row in records(measured)]
    twice = {"read", "rfm", "prefill", "decode"}
    assert stages == [name for name in STAGES for _ in range(1 + (name in twice))]
    assert _STAGES == STAGES
    assert measured.facts["image"].startswith("synthetic")
    for row in records(measured):
        assert row["ms"] > 0, row
        assert row["ms_min"] <= row["ms"] <= row["ms_max"], row
        assert row["floor_ms"] > 0, row
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_operations_and_bytes_are_those_of_one_repetition(
    measured: Benchmark, bundle: Path
) -> None:
    opened = open_bundle(bundle)
    manifest, costs = opened.manifest, graph_costs(opened.manifest)
    assert costs is not None
    rows = {(row["stage"], row["parameters"]): row for row in records(measured)}
    vision = rows["encode", "4 tiles in batches of 1"]
    assert vision["operations"] == TILES * manifest.vision.flops
    llm = costs[manifest.llm.path(Flavour.GQA)]
    weights = (bundle / "llm.onnx.data").stat().st_size
    place = 4 * 2 * manifest.llm.layers * manifest.llm.kv_heads * manifest.llm.head_dim
    prefill = rows["prefill", f"{PROMPT} tokens"]
    pairs = PROMPT * (PROMPT + 1) // 2
    assert prefill["operations"] == llm.of(GraphWork(1, tokens=PROMPT, pairs=pairs))
    seen = round(pairs / PROMPT)
    assert prefill["bytes_moved"] == weights + place * (seen + PROMPT)
    decode = rows["decode", f"{COUNT} tokens after {DEPTH}"]
    pairs = sum(DEPTH + step + 1 for step in range(COUNT))
    assert decode["operations"] == llm.of(GraphWork(COUNT, tokens=COUNT, pairs=pairs))
    assert decode["bytes_moved"] == COUNT * weights + place * (pairs + COUNT)
    assert decode["per"] == "token"
    slowest, fastest = 1e3 / decode["ms_max"], 1e3 / decode["ms_min"]
    assert 0.999 * slowest <= decode["rate"] <= 1.001 * fastest


def test_the_rfm_scores_a_level_behind_its_prefix(measured: Benchmark, bundle: Path) -> None:
    opened = open_bundle(bundle)
    manifest, costs = opened.manifest, graph_costs(opened.manifest)
    assert costs is not None
    prefix, level = (row for row in measured.measurements if row.stage == "rfm")
    before, new = (int(row.rated) for row in (prefix, level))
    assert f"level of {TILES} tiles" in level.parameters
    assert level.work is not None
    work = GraphWork(1, tokens=new, pairs=new * before + new * (new + 1) // 2)
    assert level.work.operations == costs[manifest.rfm.path(Flavour.GQA)].of(work)
    tokens = manifest.vision.per_tile
    assert new > TILES * tokens**2


def test_reads_are_counted_where_the_system_counts_them(measured: Benchmark) -> None:
    read = next(row for row in records(measured) if row["stage"] == "read")
    assert read["raster_bytes"] >= TILES * 64 * 64 * 3
    if Path("/proc/self/io").exists():
        assert read["file_bytes"] > 0
        assert read["disk_bytes"] >= 0
        assert read["peak_bytes"] > 0


def test_csv_has_a_line_per_row_and_the_machine_in_each(measured: Benchmark) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(measured))))
    assert len(lines) == len(measured.measurements)
    for line, row in zip(lines, records(measured), strict=True):
        assert float(line["ms"]) == row["ms"]
        assert line["cpu"] == measured.facts["cpu"]
        assert "fp32" in line["peak GOP/s"]


def test_json_holds_all_figures(measured: Benchmark) -> None:
    content = json.loads(to_json(measured))
    assert content["facts"]["provider"] == "cpu"
    assert content["peaks"]["operations_per_second"]["fp32"] > 0
    assert content["rows"] == records(measured)


def test_accuracy_stands_beside_speed(measured: Benchmark) -> None:
    """Of each stage, as the manifest has it; speed alone says little of a precision."""
    stages = open_bundle(default_bundle_path()).manifest.parity.stages
    both = replace(measured, accuracy=tuple(stages))
    content = json.loads(to_json(both))
    for found, stage in zip(content["accuracy"], stages, strict=True):
        assert found["stage"] == stage.stage
        assert found["figures"]["cosine"] == stage.value("cosine")
    assert "- llm (int8-dynamic): relative error" in to_markdown(both)
    assert "checkpoint" not in to_markdown(measured)


def test_markdown_is_a_table_with_equally_many_cells(measured: Benchmark) -> None:
    text = to_markdown(measured)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(measured.measurements)
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table}) == 1
    assert "peak GOP/s: fp32" in text


def test_weights_are_the_data_files_that_a_graph_names(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for graph in ("vision.onnx", "rfm.onnx", "rfm_masked.onnx", "llm.onnx"):
        data = graph.replace("_masked", "") + ".data"
        assert weight_bytes(opened, graph) == (bundle / data).stat().st_size


def test_the_command_writes_a_file(bundle: Path, tmp_path: Path) -> None:
    image = write(tmp_path / "image.tif", noise(3, 400, 300), tiled=True)
    out = tmp_path / "bench.json"
    arguments = ["bench", "-m", str(bundle), "--stages", "read,decode", "-r", "1", "-n", "2"]
    arguments += ["-d", "4", "--tiles", "2", "--image", str(image), "-q", "--no-warmup"]
    assert run([*arguments, "--format", "json", "-o", str(out)]) == 0
    content = json.loads(out.read_text())
    assert [row["stage"] for row in content["rows"]] == ["read", "read", "decode"]
    assert content["facts"]["image"] == str(image)
    assert content["facts"]["repetitions"] == "1, without a warm-up"


def test_reading_alone_loads_no_engine(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("engines were loaded")

    monkeypatch.setattr("lrs_edge.benchmarking.run.load_stages", refuse)
    image = write(tmp_path / "image.tif", noise(3, 300, 300), tiled=True)
    options = BenchOptions(stages=("read",), tiles=1, repetitions=1, image=image, peak_seconds=0.01)
    found = run_bench(bundle, options, lambda _: None)
    assert {row.stage for row in found.measurements} == {"read"}


def test_bundles_that_do_not_say_their_sizes_have_no_floors(bundle: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in bundle.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    manifest = open_bundle(bundle).manifest
    vision = msgspec.structs.replace(manifest.vision, flops=0)
    text = msgspec.json.encode(msgspec.structs.replace(manifest, vision=vision))
    (old / "manifest.json").write_bytes(text)
    options = BenchOptions(
        stages=("prefill",), prompts=(4,), repetitions=1, warmup=False, peak_seconds=0.01
    )
    found = run_bench(old, options, lambda _: None)
    (row,) = records(found)
    assert row["floor_ms"] is None
    assert row["floor_share"] is None
    assert "no floors" in found.facts["warnings"]
    assert "of the floor" not in to_markdown(found)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-p", "0"], 2, "whole numbers"),
        (["-p", "12,x"], 2, "whole numbers"),
        (["--stages", "encode,foo"], 2, "'foo' is not a stage"),
        (["-r", "0"], 2, "range"),
        (["--tiles", "0"], 2, "range"),
        (["-p", "100000"], 2, "--n-prompt"),
        (["-d", "500", "-n", "50"], 2, "--n-depth and --n-gen"),
        (["--stages", "read", "--image", "missing.tif"], 3, "does not exist"),
        (["-o", "missing/out.md"], 2, "does not exist"),
    ],
)
def test_refusals(
    bundle: Path,
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["bench", "-m", str(bundle), "-q", *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_bundle_that_does_not_load_is_told_by_the_process_that_failed(
    bundle: Path, tmp_path: Path
) -> None:
    opened = open_bundle(bundle)
    lost = Bundle(tmp_path, opened.manifest)
    with pytest.raises(BackendError, match="fresh process"):
        measure_load(
            lost,
            device="cpu",
            threads=None,
            kv_cache="float",
            verify=True,
            repetitions=1,
            warmup=False,
        )
