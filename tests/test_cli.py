"""The terminal: exit codes, streams, and one line for every refusal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

import lrs_edge
from lrs_edge.answer.answer import Answer, Progress
from lrs_edge.commands.ask import ask
from lrs_edge.commands.common import GroupedCommand
from lrs_edge.commands.eval import check_results
from lrs_edge.commands.main import COMMANDS, cli, run
from lrs_edge.engines.cores import available_cores
from lrs_edge.errors import BackendError, BundleError, ImageError, LrsEdgeError
from lrs_edge.requests.options import AskOptions
from tests.test_report import PLACE, make_answer, make_region

ROOT = Path(__file__).resolve().parent.parent


class FakeStream:
    """Pieces of an answer, as `Scene.stream` gives them."""

    def __init__(self, pieces: list[str], answer: Answer, error: BaseException | None) -> None:
        self.answer = answer
        self._pieces = pieces
        self._error = error

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces
        if self._error is not None:
            raise self._error


class FakeEngine:
    """Stands for engine and scene; remembers what it was asked."""

    def __init__(self) -> None:
        self.answer = make_answer()
        self.pieces = ["a ", "port"]
        self.error: BaseException | None = None
        self.crs: str | None = None
        self.calls: dict[str, Any] = {}

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def load(self, bundle: Path | None, **options: Any) -> FakeEngine:
        self.calls["load"] = (bundle, options)
        return self

    def open(self, path: Path, **options: Any) -> FakeEngine:
        self.calls["open"] = (path, options)
        if not path.exists():
            raise ImageError(f"{path} does not exist")
        return self

    @property
    def raster(self) -> SimpleNamespace:
        gsd = None if self.crs is None else 0.1
        info = SimpleNamespace(width=2000, height=1000, crs=self.crs, gsd=gsd, unlocated=None)
        if self.crs is None:
            info.unlocated = "it is not georeferenced"
        return SimpleNamespace(info=info)

    def can_be_placed(self) -> bool:
        return True

    def stream(
        self,
        question: str,
        options: AskOptions,
        *,
        on_progress: Callable[[Progress], None],
        trace: Path | None,
    ) -> FakeStream:
        self.calls["stream"] = (question, options, trace)
        on_progress(Progress("encode", 0, 2, 3, 1, 9))
        return FakeStream(self.pieces, self.answer, self.error)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(lrs_edge, "load", fake.load, raising=False)
    return fake


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.tif"
    path.write_bytes(b"the engine is not real")
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; there must be nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lrs-edge: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.usefixtures("engine")
def test_text_answer_on_stdout_and_evidence_on_stderr(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", image, "What is this?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "a port\n"
    assert "Looked at 2 tiles" in captured.err
    assert "Warning: the search ended early" in captured.err
    assert "\x1b" not in captured.err
    assert "encoding" not in captured.err


@pytest.mark.usefixtures("engine")
def test_quiet_leaves_stderr_empty(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", image, "What is this?", "-q"]) == 0
    assert capsys.readouterr() == ("a port\n", "")


def test_options_reach_the_engine(engine: FakeEngine, image: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    line = ["ask", image, "q", "-m", "bundle", "--policy", "full", "--resampling", "reference"]
    line += ["--max-tiles", "9", "--tiles-per-level", "4", "--max-vision-tokens", "99"]
    line += ["--kv-budget", "50", "--timeout", "2.5", "--max-tokens", "5", "--temperature", "0.5"]
    line += ["--top-p", "0.9", "--seed", "3", "--end-str", "Answer with one word."]
    line += ["--bands", "4,3,2", "--range", "-1.5,3000", "--provider", "cpu", "--threads", "2"]
    line += ["--kv-cache", "int8", "--crs", "EPSG:32632"]
    assert run([*line, "--no-verify", "--trace", str(trace)]) == 0
    bundle, loaded = engine.calls["load"]
    assert bundle == Path("bundle")
    assert loaded == {"device": "cpu", "threads": 2, "kv_cache": "int8", "verify": False}
    shown = {"bands": (4, 3, 2), "value_range": (-1.5, 3000.0), "crs": "EPSG:32632"}
    assert engine.calls["open"][1] == {**shown, "timeout": 2.5}
    question, options, traced = engine.calls["stream"]
    assert (question, traced) == ("q", trace)
    # Opening the image took some of the time.
    assert 2.4 < options.timeout < 2.5
    assert replace(options, timeout=2.5) == AskOptions(
        "full", "reference", 9, 4, 99, 50, 2.5, 5, 0.5, 0.9, 3, "Answer with one word."
    )
    assert run(["ask", image, "q", "--policy", "reference"]) == 0
    assert engine.calls["stream"][1] == AskOptions("reference")


def test_ways_to_prune_reach_the_engine(engine: FakeEngine, image: str) -> None:
    line = ["ask", image, "q", "--prune", "pdrop", "--prune-ratio", "0.25", "--prune-layers", "2,4"]
    assert run(line) == 0
    wanted = AskOptions(prune="pdrop", prune_ratio=0.25, prune_layers=(2, 4))
    assert engine.calls["stream"][1] == wanted
    assert run(["ask", image, "q", "--search", "exhaustive", "--max-tiles", "0"]) == 0
    assert engine.calls["stream"][1] == AskOptions(search="exhaustive", max_tiles=0)


def test_defaults_are_those_of_the_python_interface(engine: FakeEngine, image: str) -> None:
    assert run(["ask", image, "q"]) == 0
    assert engine.calls["stream"][1] == AskOptions()
    defaults = {"device": "auto", "threads": None, "kv_cache": "float", "verify": True}
    assert engine.calls["load"] == (None, defaults)


@pytest.mark.usefixtures("engine")
def test_json_is_all_there_is(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", image, "What is this?", "--format", "json"]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["answer"] == "a port"
    assert answer["image"] == {
        "path": image, "width": 2000, "height": 1000, "crs": None, "gsd": None,
    }  # fmt: skip
    assert captured.err == ""


def test_geojson_needs_a_place_before_anything_is_computed(
    engine: FakeEngine, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", image, "q", "--format", "geojson"]) == 2
    assert "not georeferenced" in refusal(capsys)
    assert "stream" not in engine.calls


def test_geojson_goes_to_the_named_file(
    engine: FakeEngine, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.crs = "EPSG:32632"
    engine.answer = make_answer(make_region(**PLACE))
    output = tmp_path / "regions.geojson"
    assert run(["ask", image, "q", "--format", "geojson", "-o", str(output)]) == 0
    assert len(json.loads(output.read_text())["features"]) == 1
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.tif", "regions.geojson"]


@pytest.mark.usefixtures("engine")
def test_text_goes_to_the_named_file(image: str, tmp_path: Path) -> None:
    output = tmp_path / "answer.txt"
    output.write_text("old")
    assert run(["ask", image, "q", "-q", "-o", str(output)]) == 0
    assert output.read_text() == "a port\n"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("option", ["-o", "--trace"])
def test_the_image_is_never_overwritten(
    image: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(image).read_bytes()
    assert run(["ask", image, "q", option, image]) == 2
    assert "destroy" in refusal(capsys)
    assert Path(image).read_bytes() == before


def test_an_output_that_cannot_be_is_refused_first(
    engine: FakeEngine, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", image, "q", "-o", str(tmp_path / "no" / "file")]) == 2
    assert "does not exist" in refusal(capsys)
    assert run(["ask", image, "q", "-o", str(tmp_path)]) == 2
    assert "directory" in refusal(capsys)
    assert engine.calls == {}


def test_a_failure_leaves_no_output_file(
    engine: FakeEngine, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.error = BackendError("llm.onnx failed while running: no")
    output = tmp_path / "answer.json"
    assert run(["ask", image, "q", "--format", "json", "-o", str(output)]) == 5
    assert "llm.onnx" in refusal(capsys)
    assert not output.exists()


def test_question_from_standard_input(
    engine: FakeEngine, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "Wie viele Häuser?\n".encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert run(["ask", image, "-"]) == 0
    assert engine.calls["stream"][0] == "Wie viele Häuser?"


@pytest.mark.parametrize(
    "data",
    [b"\xef\xbb\xbfWhat is it?\r\n", "\ufeffWhat is it?\r\n".encode("utf-16-le"),
     "What is it?\n".encode("utf-16"), b"  What is it? \t\r\n\n"],
)  # fmt: skip
def test_what_editors_put_around_a_question_is_cut_off(
    engine: FakeEngine, image: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert run(["ask", image, "-"]) == 0
    assert engine.calls["stream"][0] == "What is it?"


@pytest.mark.parametrize("typed", ["What is it? ", "What is it?\r", "\ufeffWhat is it?\r\n"])
def test_a_typed_question_is_cut_like_a_piped_one(
    engine: FakeEngine, image: str, typed: str
) -> None:
    assert run(["ask", image, typed]) == 0
    assert engine.calls["stream"][0] == "What is it?"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("data", [b"x" * (2 << 20), b"\xff\xfea", b"\xc3"])
def test_standard_input_that_is_no_question(
    image: str, data: bytes,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert run(["ask", image, "-"]) == 2
    assert "standard input" in refusal(capsys)


def test_a_timeout_prints_what_there_is(
    engine: FakeEngine, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.answer = make_answer(finish_reason="timeout", text="a")
    engine.pieces = ["a"]
    assert run(["ask", image, "q", "-q"]) == 6
    assert capsys.readouterr().out == "a\n"


def test_control_characters_do_not_reach_the_terminal(
    engine: FakeEngine, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.pieces = ["a\x1b[2J", "b\r\u202e", "\N{GRINNING FACE} ü"]
    assert run(["ask", image, "q", "-q"]) == 0
    assert capsys.readouterr().out == "a[2Jb\N{GRINNING FACE} ü\n"
    assert run(["ask", "no\x1b\nfile", "q", "-q"]) == 3
    assert "\x1b" not in refusal(capsys)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LrsEdgeError("no"), 1),
        (ImageError("no"), 3),
        (BundleError("no"), 4),
        (BackendError("no"), 5),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("two\nlines"), 1),
    ],
)
def test_exit_codes(
    engine: FakeEngine, image: str, error: BaseException, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    engine.error, engine.pieces = error, []
    assert run(["ask", image, "q"]) == code
    line = refusal(capsys)
    assert ("this is a bug" in line) == isinstance(error, RuntimeError)


def test_debug_shows_the_traceback(
    engine: FakeEngine, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.error = RuntimeError("somewhere")
    assert run(["ask", image, "q", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        ["ask"],
        ["ask", "image.tif"],
        ["ask", "image.tif", "q", "--format", "xml"],
        ["ask", "image.tif", "q", "--max-tiles", "-1"],
        ["ask", "image.tif", "q", "--prune", "best"],
        ["ask", "image.tif", "q", "--prune", "pdrop", "--prune-layers", "2;4"],
        ["ask", "image.tif", "q", "--prune", "none", "--search", "exhaustive"],
        ["ask", "image.tif", "q", "--max-tiles", "many"],
        ["ask", "image.tif", "q", "--timeout", "-1"],
        ["ask", "image.tif", "q", "--timeout", "nan"],
        ["ask", "image.tif", "q", "--top-p", "2"],
        ["ask", "image.tif", "q", "--bands", "1,2"],
        ["ask", "image.tif", "q", "--bands", "a,b,c"],
        ["ask", "image.tif", "q", "--range", "1"],
        ["ask", "image.tif", "q", "--range", "5,1"],
        ["ask", "image.tif", "q", "--range", "nan,1"],
        ["ask", "image.tif", "q", "--range", "0,inf"],
        ["ask", "image.tif", "q", "--unknown"],
        ["unknown"],
        ["--unknown"],
    ],
)
def test_wrong_usage_is_one_line(
    engine: FakeEngine, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line) == 2
    refusal(capsys)
    assert engine.calls == {}


@pytest.mark.parametrize("line", [[], ["models"]])
def test_no_command_shows_help(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Commands:" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"lrs-edge {lrs_edge.__version__}\n"


@pytest.mark.parametrize("command", ["ask", "eval"])
def test_help_lists_options_in_groups(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    titles = re.findall(r"^(\w+):$", shown, re.MULTILINE)
    assert titles == ["Common", "Budgets", "Raster", "Research"]
    sections = dict(zip(titles, re.split(r"^\w+:$", shown, flags=re.MULTILINE)[1:], strict=True))
    for option, title in (
        ("--model", "Common"),
        ("--help", "Common"),
        ("--max-tiles", "Budgets"),
        ("--bands", "Raster"),
        ("--prune", "Research"),
        ("--trace" if command == "ask" else "--search", "Research"),
    ):
        found = [name for name, text in sections.items() if re.search(rf" {option}\b(?!-)", text)]
        assert title in found, option
    first = sections["Common"] + sections["Budgets"]
    assert not re.search("fastv|pdrop|visionzip|prumerge|exhaustive", first)


def test_every_grouped_option_is_one_of_ask() -> None:
    names = {param.name for param in ask.params}
    for group in GroupedCommand.groups.values():
        assert group <= names


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from lrs_edge.commands.main import run; code = run(['--help']);"
        "heavy = {'numpy', 'onnxruntime', 'rasterio', 'torch', 'rich', 'tokenizers', 'PIL'};"
        "sys.exit(code or ' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_listed_commands_are_there(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name


@pytest.mark.parametrize(("package", "code"), [("onnxruntime", 5), ("torch", 1), ("numpy", 1)])
def test_a_missing_package_is_no_bug(
    engine: FakeEngine, image: str, package: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.error, engine.pieces = ModuleNotFoundError("gone", name=package), []
    assert run(["ask", image, "q"]) == code
    line = refusal(capsys)
    assert f"the package {package} is needed" in line
    assert "pip install '.[cpu" in line


def test_nobody_reads_the_output() -> None:
    script = "from lrs_edge.commands.main import main; main()"
    for line in (["--help"], ["doctor", "--format", "json"]):
        with subprocess.Popen(
            [sys.executable, "-c", script, *line],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait() == 141


@pytest.mark.parametrize("package", ["torch", "onnx"])
@pytest.mark.parametrize(("command", "doing"), [("export", "exporting"), ("distill", "distilling")])
def test_export_tooling_names_the_package_that_is_missing(
    command: str, doing: str, package: str, tmp_path: Path
) -> None:
    # In a process of its own: modules of the exporter that are loaded already would hide it.
    script = (
        f'import sys; sys.modules["{package}"] = None; '
        "from lrs_edge.commands.main import main; main()"
    )
    options = ["--data", str(tmp_path)] if command == "distill" else []
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", script, command, str(tmp_path), "-o", "out", *options],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{doing} needs the package {package}" in done.stderr
    assert "pip install '.[cpu,export]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["-o", "--trace"])
@pytest.mark.parametrize("name", ["x" * 300, "image.tif/below", "/proc/nothing"])
def test_what_cannot_be_written_is_refused_first(
    engine: FakeEngine, image: str, tmp_path: Path, option: str, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(["ask", image, "q", option, str(tmp_path / name)]) == 2
    refusal(capsys)
    assert engine.calls == {}


@pytest.mark.usefixtures("engine")
def test_an_answer_is_not_lost_with_a_full_disk(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", image, "q", "--format", "json", "-q", "-o", "/dev/full"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["answer"] == "a port"
    assert captured.err.startswith("lrs-edge: error: /dev/full cannot be written (No space left")
    assert [path.name for path in tmp_path.iterdir()] == ["image.tif"]


@pytest.mark.usefixtures("engine")
def test_a_result_keeps_the_permissions_of_the_file_it_replaces(image: str, tmp_path: Path) -> None:
    output = tmp_path / "answer.txt"
    output.write_text("old")
    output.chmod(0o600)
    assert run(["ask", image, "q", "-q", "-o", str(output)]) == 0
    assert (output.read_text(), output.stat().st_mode & 0o777) == ("a port\n", 0o600)


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_more_threads_than_cores_are_not_taken(
    engine: FakeEngine, image: str, quiet: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ask", image, "q", "--threads", "100000", *quiet]) == 0
    assert engine.calls["load"][1]["threads"] == available_cores()
    assert ("--threads 100000: this process may use" in capsys.readouterr().err) == (not quiet)
    for refused in ("0", "-1", "-64", "two"):
        assert run(["ask", image, "q", "--threads", refused]) == 2


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lrs_edge", "--version"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"lrs-edge {lrs_edge.__version__}\n"


@pytest.mark.parametrize("name", ["x" * 300, "no/results", "", "questions", "pipe"])
def test_results_that_cannot_be_written_are_refused_first(tmp_path: Path, name: str) -> None:
    (tmp_path / "questions").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LrsEdgeError) as refused:
        check_results(tmp_path / name, tmp_path / "questions")
    assert refused.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "questions"]
    check_results(tmp_path / ("x" * 255), tmp_path / "questions")


def test_how_the_image_is_shown_reaches_the_engine(engine: FakeEngine, image: str) -> None:
    line = ["ask", image, "q", "--transparency", "ignore", "--orientation", "exif", "--page", "2"]
    given = {"transparency": "ignore", "orientation": "exif", "page": 2}
    rest = {"bands": None, "value_range": None, "crs": None, "timeout": None}
    assert run([*line, "--policy", "reference"]) == 0
    assert engine.calls["open"][1] == {**rest, **given}
    assert run(["ask", image, "q"]) == 0
    assert engine.calls["open"][1] == rest
    # The authors' code does not turn photographs.
    assert run(["ask", image, "q", "--policy", "reference"]) == 0
    assert engine.calls["open"][1] == {**rest, "orientation": "stored"}
