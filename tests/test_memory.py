"""What a model takes in memory: the arithmetic against graphs, against processes, and as told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lrs_edge.bundle.bundle import default_bundle_path, open_bundle
from lrs_edge.bundle.memory import of_bundle
from lrs_edge.bundle.memory_sizes import DecoderSize, ModelSize, VisionSize, of_sizes
from lrs_edge.commands.main import run
from tests.checkpoints import write_qwen
from tests.golden_data import checkpoint

ROOT = Path(__file__).resolve().parent.parent

#: Of a process, against what was reckoned for the tokens that it kept: what frees memory late, and
#: what the system's libraries take, differ by machine.
BOUNDS = (0.6, 1.3)

ASK = """
import sys
import lrs_edge
from lrs_edge.requests.memory import peak_memory
with lrs_edge.load(*sys.argv[2:]) as engine:
    answer = engine.open(sys.argv[1]).ask("Is there a ship?")
print(peak_memory(), answer.tokens.sent + answer.tokens.text + answer.tokens.generated)
"""


def peak(image: Path, *bundle: str) -> tuple[int, int]:
    """Peak memory of a process of its own, and tokens in the language model's cache."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(image), *bundle],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    memory, tokens = map(int, done.stdout.split())
    return memory, tokens


def test_the_embedded_bundle_against_its_process() -> None:
    memory, tokens = peak(ROOT / "examples" / "islands.tif")
    need = of_bundle(open_bundle(None), tokens)
    assert BOUNDS[0] < memory / need.total < BOUNDS[1]
    assert [stage.name for stage in need.stages] == ["vision", "rfm", "llm"]
    # The RFM is the language model's first layers: on disk once.
    assert need.stages[1].file == 0
    assert need.smallest_gb == 8


@pytest.mark.slow
def test_a_golden_checkpoint_against_its_process(tmp_path: Path) -> None:
    exported = pytest.importorskip("lrs_edge_export", reason="needs the `export` extra")
    found = checkpoint("qwen")
    if found is None:
        pytest.skip("only a part of the golden data is here")
    bundle = tmp_path / "bundle"
    exported.export_bundle(str(found), bundle, exported.ExportOptions(parity=False))
    memory, tokens = peak(ROOT / "examples" / "islands.tif", str(bundle))
    need = of_bundle(open_bundle(bundle), tokens)
    assert BOUNDS[0] < memory / need.total < BOUNDS[1]


def test_sizes_and_the_graphs_that_come_of_them(tmp_path: Path) -> None:
    """What is reckoned of a config alone is what the exported graphs say."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    import lrs_edge_export

    folder = write_qwen(tmp_path / "checkpoint")
    options = lrs_edge_export.ExportOptions(parity=False)
    lrs_edge_export.export_bundle(str(folder), tmp_path / "bundle", options)
    found = of_bundle(open_bundle(tmp_path / "bundle"), 512)
    config = json.loads((folder / "config.json").read_text())
    tower = json.loads((folder / "tower" / "config.json").read_text())["vision_config"]
    hidden, wide, layers = (
        tower[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    out, run_layers = config["hidden_size"], layers - 1
    size = ModelSize(
        name="tiny",
        vision=VisionSize(
            patches=17, hidden=hidden, heads=2, intermediate=wide,
            matrices=run_layers * hidden * (4 * hidden + 2 * wide) + hidden * out + out * out,
            others=0, tokens=16, local=4,
        ),
        llm=DecoderSize(
            layers=config["num_hidden_layers"], hidden=out, heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"], head_dim=out // config["num_attention_heads"],
            intermediate=config["intermediate_size"],
        ),
        vocabulary=259,
        context=512,
        own_rfm=2,
    )  # fmt: skip
    reckoned = of_sizes(size, "fp32", 512)
    for one, other in zip(reckoned.stages, found.stages, strict=True):
        assert one.kv == other.kv
        assert one.file == pytest.approx(other.file, rel=0.25)
        assert 0.5 < one.workspace / other.workspace < 2
    assert reckoned.kept == found.kept


def test_info_of_a_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(default_bundle_path())
    assert run(["info", bundle, "--memory", "--format", "json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["source"] == "bundle"
    assert whole["context"] == 8192
    (found,) = whole["precisions"]
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert found["total"] == sum(stage["total"] for stage in stages.values()) + sum(
        found[name] for name in ("embeddings", "kept_tokens", "process")
    )
    assert found["fits_gb"] == [8, 16, 24, 64]
    assert run(["info", bundle, "--memory", "--context", "1024", "--format", "json"]) == 0
    short = json.loads(capsys.readouterr().out)
    kv = short["precisions"][0]["stages"][-1]["kv_cache"]
    assert kv * 8 == stages["llm"]["kv_cache"]
    assert run(["info", bundle, "--memory"]) == 0
    text = capsys.readouterr().out
    assert "fits 8, 16, 24, 64 GB" in text
    assert "workspace" in text


def test_info_of_recipes_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "--memory", "Qwen3-VL-4B", "--format", "json"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert {need["precision"] for need in recipe["precisions"]} == {
        "fp32", "int8-dynamic", "int4-weight", "fp16",
    }  # fmt: skip
    assert "int8-dynamic" in recipe["devices"]["64 GB"]
    from lrs_edge_export.families.recipes import find_recipe

    found = find_recipe("qwen3-vl-4b")
    assert found is not None
    # A folder with nothing in it but the config: no weights are read.
    (tmp_path / "config.json").write_text(json.dumps(found.config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert run(["info", "--memory", str(path), "--format", "json"]) == 0
        checkpoint_facts = json.loads(capsys.readouterr().out)
        assert checkpoint_facts["source"] == "config.json"
        assert checkpoint_facts["precisions"] == recipe["precisions"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--memory", "nowhere"], 2, "neither a bundle nor"),
        (["--context", "100", "image.tif"], 2, "add --memory"),
        (["--memory", "--context", "0", "qwen3-vl-4b"], 2, "--context"),
        (["--memory", "folder"], 1, "GPT2"),
        (["--memory", "damaged"], 1, "not JSON"),
    ],
)
def test_what_info_cannot_reckon(
    arguments: list[str], code: int, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, text in (("folder", '{"architectures": ["GPT2"]}'), ("damaged", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert run(["info", *arguments]) == code
    assert words in capsys.readouterr().err


def test_recipes_are_listed_without_torch() -> None:
    script = (
        'import sys; sys.modules["torch"] = sys.modules["onnx"] = None; '
        "from lrs_edge.commands.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "models", "recipes", "--format", "json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {recipe["name"]: recipe for recipe in json.loads(done.stdout)}
    assert found["llava-largeimg-qwen2-7b"]["taken"]
    small = found["smolvlm-256m"]
    assert small["licence"] == "Apache-2.0"
    assert small["command"].startswith("lrs-edge export smolvlm-256m")
    assert small["memory"]["int8"] < small["memory"]["fp32"]


def test_recipes_for_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "recipes", "--fits", "8"]) == 0
    text = capsys.readouterr().out
    assert "smolvlm-256m" in text
    assert "llava-onevision-7b" not in text
    assert run(["models", "recipes", "--fits", "0"]) == 2


def test_notes_of_recipes_say_nothing_of_memory_that_is_reckoned() -> None:
    """A figure by hand contradicted the documentation about exports of large checkpoints."""
    from lrs_edge_export.families.recipes import all_recipes

    for recipe in all_recipes():
        assert "GB" not in recipe.notes.replace("about 2 GB of memory, parity included", "")
        assert "parity check needs" not in recipe.notes
