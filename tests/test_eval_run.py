"""`lrs-edge eval` from the terminal on a real engine: run, kill, go on, split, score, compare."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lrs_edge
from lrs_edge.commands import eval_progress
from lrs_edge.commands.eval_progress import EvalProgress
from lrs_edge.commands.main import run
from lrs_edge.errors import BackendError, OutOfMemoryError
from lrs_edge.evaluation.question_formats import MME_END_STR
from lrs_edge.evaluation.questions import read_questions
from lrs_edge.evaluation.results import read_results
from lrs_edge.evaluation.runner import RunSettings, chosen_questions
from lrs_edge.requests.options import AskOptions
from lrs_edge.scene import Scene
from tests.checkpoints import write_nano
from tests.evaluation import lrs_row, mme_row, private_wordnet, write_lines
from tests.test_engine import picture

EXAMPLES = Path(__file__).parent.parent / "examples"
#: The tiny model's answers are nonsense; two tokens of it are enough.
QUICK = ("--max-tokens", "2", "--no-synonyms", "--threads", "1", "--provider", "cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny nano checkpoint: tiles of 64 pixels, levels from 192."""
    pytest.importorskip("torch", reason="exporting needs the `export` extra")
    from lrs_edge_export import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("eval")
    target = folder / "bundle"
    export_bundle(str(write_nano(folder / "nano")), target, ExportOptions(parity=False))
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images and six questions about them, in mixed order."""
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images" / "a.png", 500, 300)
    picture(tmp_path / "images" / "b.png", 100, 80)
    rows = [
        lrs_row(i, image=f"{image}.png", text=f"How many {what}?", hbox=[10, 10, 90, 70])
        for i, (image, what) in enumerate(
            [
                ("a", "ships"),
                ("b", "ships"),
                ("a", "cars"),
                ("b", "cars"),
                ("a", "trees"),
                ("a", "x"),
            ]
        )
    ]
    write_lines(tmp_path / "q.jsonl", *rows)
    return tmp_path


def evaluate(bundle: Path, folder: Path, *options: str, questions: str = "q.jsonl") -> int:
    line = ["eval", str(folder / questions), "--images", str(folder / "images"), *QUICK]
    return run([*line, "-o", str(folder / "r.jsonl"), "-m", str(bundle), *options])


def answers(path: Path) -> dict[int, dict[str, Any]]:
    """Everything in a results file but the times, by index."""
    found = {}
    for line in path.read_text().splitlines()[1:]:
        row = json.loads(line)
        row.get("work", {}).pop("seconds", None)
        found[row["index"]] = row
    return found


def test_a_run_answers_scores_and_records(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder, "--format", "json") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert captured.err == ""
    assert facts["overall"]["questions"] == 6
    assert facts["overall"]["missing"] == facts["overall"]["errors"] == 0
    assert facts["regions"]["questions"] == 6
    assert facts["cost"]["tflops"]["total"] > 0
    assert {"0-1,000 px"} == set(facts["sizes"])
    results = read_results([folder / "r.jsonl"])
    assert results.header.model == "nano"
    # Questions about one image are asked one after the other; tiles are encoded once.
    order = [
        json.loads(line)["index"] for line in (folder / "r.jsonl").read_text().splitlines()[1:]
    ]
    assert order == [0, 2, 4, 5, 1, 3]
    first, second = results.by_index[0].work, results.by_index[2].work
    assert first is not None
    assert second is not None
    assert first.tiles_from_cache == 0
    assert first.tiles_encoded > 0
    assert second.tiles_from_cache > 0
    assert first.flops is not None
    assert second.flops is not None
    assert second.flops.total < first.flops.total
    # The level is as fine as the image, and its tiles are all over it.
    assert first.finest is not None
    assert first.finest.width >= 500
    assert set(first.finest.tiles) <= {
        (row, col) for row in range(first.finest.tile_rows) for col in range(first.finest.tile_cols)
    }


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder) == 0
    path = folder / "r.jsonl"
    whole, wanted = path.read_bytes(), answers(path)
    lines = whole.splitlines(keepends=True)
    # Killed in the middle of the fourth answer.
    path.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    capsys.readouterr()
    assert evaluate(bundle, folder) == 0
    assert path.read_bytes().startswith(b"".join(lines[:4]))
    found = answers(path)
    for index, row in wanted.items():
        # What was remembered from questions before the kill is encoded again.
        assert found[index]["text"] == row["text"]
        assert found[index]["work"]["finest"] == row["work"]["finest"]
    assert path.read_bytes().count(b"\n") == 7
    before = path.read_bytes()
    assert evaluate(bundle, folder) == 0
    assert path.read_bytes() == before


def test_other_settings_or_questions_are_refused(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder, "--limit", "1") == 0
    before = (folder / "r.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluate(bundle, folder, "--max-tiles", "5") == 2
    assert "max_tiles: None, not 5" in capsys.readouterr().err
    write_lines(folder / "q.jsonl", lrs_row(0, image="a.png"))
    assert evaluate(bundle, folder) == 2
    assert "question file" in capsys.readouterr().err
    assert (folder / "r.jsonl").read_bytes() == before


def test_a_limit_can_be_raised_later(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder, "--limit", "2") == 0
    assert "4 not asked yet" in capsys.readouterr().out
    assert evaluate(bundle, folder) == 0
    assert len(read_results([folder / "r.jsonl"])) == 6


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 9])
def test_chunks_are_a_partition(folder: Path, parts: int) -> None:
    questions = read_questions(folder / "q.jsonl")
    chunks = [
        chosen_questions(
            RunSettings(questions, folder, AskOptions(), num_chunks=parts, chunk=chunk)
        )
        for chunk in range(parts)
    ]
    asked = [question.index for chunk in chunks for question in chunk]
    assert asked == [0, 2, 4, 5, 1, 3]
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1


def test_chunks_together_are_the_whole_run(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder) == 0
    whole = answers(folder / "r.jsonl")
    (folder / "r.jsonl").unlink()
    parts = []
    for chunk in range(2):
        assert evaluate(bundle, folder, "--num-chunks", "2", "--chunk", str(chunk)) == 0
        parts.append((folder / "r.jsonl").rename(folder / f"r{chunk}.jsonl"))
    together = answers(parts[0]) | answers(parts[1])
    assert {i: row["text"] for i, row in together.items()} == {
        i: row["text"] for i, row in whole.items()
    }
    capsys.readouterr()
    scoring = ["eval", "--score", *map(str, parts), "--no-synonyms", "--debug"]
    assert run([*scoring, "--format", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["overall"]["questions"], facts["overall"]["missing"]) == (6, 0)
    assert evaluate(bundle, folder, "--num-chunks", "9", "--chunk", "0", "--limit", "1") == 0
    assert "chunk 0 has none" in capsys.readouterr().err
    assert evaluate(bundle, folder, "--num-chunks", "2", "--chunk", "2") == 2
    assert "not one of 0..1" in capsys.readouterr().err


def test_failures_are_recorded_counted_and_asked_again_only_on_request(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "b.png").write_bytes(b"no image")
    assert evaluate(bundle, folder) == 1
    captured = capsys.readouterr()
    assert "question FAIR_1 failed: " in captured.err
    assert "failed, counted as wrong: 2 (" in captured.err
    assert "of 6" in captured.out
    assert "2 failed, counted as wrong" in captured.out
    picture(folder / "images" / "b.png", 100, 80)
    assert evaluate(bundle, folder) == 1
    assert evaluate(bundle, folder, "--retry-errors") == 0
    assert len(read_results([folder / "r.jsonl"])) == 6


def test_the_bar_counts_every_question_once(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []

    class Bar(EvalProgress):
        def __init__(self, total: int, *, enabled: bool) -> None:
            super().__init__(total, enabled=enabled)
            self.total, self.failures = total, []
            bars.append(self)

        def add(self, *, correct: bool, failed: bool) -> None:
            super().add(correct=correct, failed=failed)
            self.failures.append(failed)

    monkeypatch.setattr(eval_progress, "EvalProgress", Bar)
    image = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "b.png").write_bytes(b"no image")
    assert evaluate(bundle, folder) == 1
    (folder / "images" / "b.png").write_bytes(image)
    assert evaluate(bundle, folder, "--retry-errors") == 0
    assert evaluate(bundle, folder, "--limit", "2") == 0
    assert [len(bar.failures) for bar in bars] == [bar.total for bar in bars] == [6, 6, 2]
    assert [sum(bar.failures) for bar in bars] == [2, 0, 0]


def test_names_that_are_too_long_or_no_text(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [lrs_row(0, image="a" * 3000), lrs_row(1, image="b.png")]
    write_lines(folder / os.fsdecode(b"q\xff.jsonl"), *rows)
    assert evaluate(bundle, folder, questions=os.fsdecode(b"q\xff.jsonl")) == 1
    assert "question FAIR_0 failed: " in capsys.readouterr().err
    found = read_results([folder / "r.jsonl"])
    assert found.header.questions.file == "q?.jsonl"
    assert [bool(result.error) for result in found] == [True, False]
    assert evaluate(bundle, folder, "--end-str", os.fsdecode(b"\xff")) == 2
    assert "--end-str is not valid Unicode" in capsys.readouterr().err


def test_what_no_question_could_do_is_refused_before_anything_is_written(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(bundle, folder, "--prune", "fastv") == 4
    assert "--attention-layers" in capsys.readouterr().err
    assert evaluate(bundle, folder, "--policy", "reference", "--max-tiles", "9") == 2
    assert "leave --max-tiles out" in capsys.readouterr().err
    assert not (folder / "r.jsonl").exists()


def test_quiet_says_nothing_but_the_score(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "b.png").unlink()
    assert evaluate(bundle, folder, "-q") == 1
    assert capsys.readouterr().err == ""


def test_running_out_of_memory_is_one_question_s_failure_a_broken_engine_is_not(
    bundle: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Scene.ask

    def ask(self: Scene, question: str, *args: Any, **kwargs: Any) -> lrs_edge.Answer:
        if "cars" in question:
            raise OutOfMemoryError("too many tiles")
        if "x" in question:
            raise MemoryError("Unable to allocate 7 GiB")
        return real(self, question, *args, **kwargs)

    monkeypatch.setattr(Scene, "ask", ask)
    assert evaluate(bundle, folder) == 1
    assert "3 failed, counted as wrong" in capsys.readouterr().out

    def broken(*_: Any, **__: Any) -> lrs_edge.Answer:
        raise BackendError("the driver is gone")

    monkeypatch.setattr(Scene, "ask", broken)
    assert evaluate(bundle, folder, "--retry-errors") == 5
    assert "driver" in capsys.readouterr().err
    assert len(read_results([folder / "r.jsonl"])) == 6


def test_an_interrupted_run_keeps_its_answers(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Scene.ask

    def ask(self: Scene, question: str, *args: Any, **kwargs: Any) -> lrs_edge.Answer:
        if "trees" in question:
            raise KeyboardInterrupt
        return real(self, question, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Scene, "ask", ask)
        assert evaluate(bundle, folder) == 130
    assert [result.index for result in read_results([folder / "r.jsonl"])] == [0, 2]
    assert evaluate(bundle, folder) == 0


def test_multiple_choice_is_asked_with_the_authors_instruction(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [mme_row(Image="a.png"), mme_row(Image="b.png", Category="color")]
    (folder / "q.json").write_text(json.dumps(rows))
    assert evaluate(bundle, folder, questions="q.json") == 0
    assert "letter of the choice" in capsys.readouterr().out
    results = read_results([folder / "r.jsonl"])
    assert results.header.options["end_str"] == MME_END_STR
    assert results.by_index[0].choices[2] == "(C) 7"
    (folder / "r.jsonl").unlink()
    assert evaluate(bundle, folder, "--end-str", "One letter.", questions="q.json") == 0
    assert read_results([folder / "r.jsonl"]).header.options["end_str"] == "One letter."


def test_wordnet_is_asked_for_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    line = ["eval", str(folder / "q.jsonl"), "--images", str(folder / "images")]
    line += ["-o", str(folder / "r.jsonl"), "-m", str(folder / "no bundle"), "--wordnet"]
    assert run([*line, str(folder)]) == 1
    assert "does not hold WordNet" in capsys.readouterr().err
    assert not (folder / "r.jsonl").exists()


def test_synonyms_count_in_a_score(
    bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    assert evaluate(bundle, folder, "--limit", "1") == 0
    path = folder / "r.jsonl"
    header, line = path.read_text().splitlines()
    row = json.loads(line) | {"text": "Two", "ground_truth": "2"}
    path.write_text(f"{header}\n{json.dumps(row)}\n")
    capsys.readouterr()
    words = str(private_wordnet(folder))
    assert run(["eval", "--score", str(path), "--wordnet", words]) == 0
    assert "1 by synonyms" in capsys.readouterr().out
    assert run(["eval", "--compare", str(path), str(path), "--wordnet", words]) == 0
    assert "won 0 and lost 0 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["eval"], "(?i)missing argument"),
        (["eval", "{q}"], "needs --images DIR and -o RESULTS"),
        (["eval", "{q}", "--images", "{i}"], "needs --images DIR and -o RESULTS"),
        (["eval", "{q}", "{q}", "--images", "{i}", "-o", "{r}"], "name one file of questions"),
        (["eval", "{q}", "--images", "{q}", "-o", "{r}"], "is not a directory"),
        (["eval", "{q}", "--images", "{f}", "-o", "{r}"], "none of the 2 images"),
        (["eval", "{q}", "--images", "{i}", "-o", "{q}"], "is an input"),
        (["eval", "{q}", "--images", "{i}", "-o", "{i}"], "is a directory"),
        (["eval", "{q}", "--images", "{i}", "-o", "{r}", "--range", "9,1"], "lower one first"),
        (["eval", "{i}", "--images", "{i}", "-o", "{r}"], "cannot be read"),
        (["eval", "--score", "{q}"], "is not what"),
        (["eval", "--score", "--compare", "{q}", "{q}"], "cannot be used together"),
        (["eval", "--compare", "{q}"], "takes two results files, not 1"),
        (["eval", "--score", "{q}", "--max-tiles", "3"], "--max-tiles is for a run"),
        (["eval", "--compare", "{q}", "{q}", "-o", "{r}"], "--output is for a run"),
    ],
)
def test_wrong_usage_is_refused(
    folder: Path, line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"q": folder / "q.jsonl", "i": folder / "images", "r": folder / "r.jsonl", "f": folder}
    assert run([part.format(**places) for part in line]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "r.jsonl").exists()


def test_the_embedded_model_answers_a_question_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(EXAMPLES / "coast.tif") as coast:
        coast.crop((0, 0, 1000, 900)).save(tmp_path / "part.png")
    asked = ["Is there an airport?", "Rural or urban?"]
    part = tmp_path / "part.png"
    with lrs_edge.load(provider="cpu", threads=1) as engine, engine.open(part) as scene:
        said = [scene.ask(question).text for question in asked]
    rows = [
        lrs_row(0, image="part.png", category="presence", text=asked[0], ground_truth=said[0],
                hbox=...),
        lrs_row(1, image="part.png", category="rural or urban", text=asked[1],
                ground_truth=said[1].upper(), hbox=[0, 0, 1000, 900]),
    ]  # fmt: skip
    questions = write_lines(tmp_path / "q.jsonl", *rows)
    line = ["eval", str(questions), "--images", str(tmp_path), "-o", str(tmp_path / "r.jsonl")]
    assert run([*line, "--no-synonyms", "--format", "json", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["overall"]["accuracy"] == facts["overall"]["average_accuracy"] == 1.0
    # Level 0 is the finest for an image of this size, and all its tiles are looked at.
    assert facts["regions"] == {
        "questions": 1,
        "recall": 1.0,
        "coverage": 1.0,
        "random_recall": 1.0,
        "random_coverage": 1.0,
    }
