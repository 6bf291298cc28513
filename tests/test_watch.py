"""Watching a folder: every product once, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lrs_edge.errors import BackendError, JournalError, QuestionError, UsageError
from lrs_edge.watching import results as results_module
from lrs_edge.watching.hook import NOT_STARTED, TIMED_OUT, Hook, read_hook
from lrs_edge.watching.journal import Journal
from lrs_edge.watching.names import product_name, result_name
from lrs_edge.watching.products import Patterns, Settling, scan
from lrs_edge.watching.questions import read_questions
from lrs_edge.watching.waking import Waking, notices
from lrs_edge.watching.worker import MAX_UNFINISHED, Worker
from tests.watching import QUESTIONS, FakeTime, Killed, Station, without_syncing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    without_syncing(monkeypatch)


@pytest.fixture
def station(tmp_path: Path) -> Station:
    return Station(tmp_path)


def test_every_product_gets_every_question_once(station: Station) -> None:
    station.land("a.tif", "one")
    station.land("below/b.tif", "two")
    worker = station.run()
    assert worker.answered == 4
    assert len(station.results()) == 8
    lines = [json.loads(line) for line in station.lines]
    assert [(line["product"], line["question_id"]) for line in lines] == [
        (name, question.id) for name in ("a.tif", "below/b.tif") for question in QUESTIONS
    ]
    written = json.loads(Path(lines[2]["json"]).read_text())
    assert written["answer"] == "two: How many ships?"
    assert written["watch"]["sha256"] == lines[2]["sha256"]
    assert json.loads(Path(lines[2]["geojson"]).read_text())["type"] == "FeatureCollection"
    assert station.run().answered == 0
    assert set(station.asker.asked.values()) == {1}
    assert len(station.lines) == 4


def test_a_question_that_is_new_is_asked_of_what_is_there(station: Station) -> None:
    station.land("a.tif")
    every = station.settings.questions
    object.__setattr__(station.settings, "questions", every[:1])
    assert station.run().answered == 1
    object.__setattr__(station.settings, "questions", every)
    assert station.run().answered == 1
    assert set(station.asker.asked.values()) == {1}


def test_the_same_product_again_is_not_asked_and_a_changed_one_is(station: Station) -> None:
    path = station.land("a.tif", "one")
    station.run()
    path.unlink()
    station.land("a.tif", "one")
    os.utime(path, (1, 1))
    assert station.run().answered == 0
    station.land("a.tif", "two")
    assert station.run().answered == 2
    station.land("a.tfw", "a place")
    assert station.run().answered == 2
    assert len(station.results()) == 12  # Answers about what it was before are kept.


def test_a_half_written_product_waits(station: Station) -> None:
    path = station.land("a.tif", "ha")
    texts = ["half", "half a", "half an image"]
    station.time.events = [lambda text=text: path.write_text(text) and None for text in texts]  # type: ignore[misc]
    station.run()
    assert [json.loads(line)["answer"] for line in station.lines] == [
        f"half an image: {question.text}" for question in QUESTIONS
    ]


def test_a_product_that_never_rests_is_left_for_the_next_run(station: Station) -> None:
    path = station.land("a.tif", "x")
    station.time.events = [lambda: path.write_text(f"{os.urandom(9)!r}") and None] * 100  # type: ignore[list-item]
    assert station.run().answered == 0
    station.time.events = []
    assert station.run().answered == 2


def test_a_product_that_changes_while_it_is_asked_is_looked_at_again(station: Station) -> None:
    path = station.land("a.tif", "old")

    def step(name: str) -> None:
        if name == "replied" and path.read_text() == "old":
            path.write_text("new image")

    station.run(step)
    assert [json.loads(line)["answer"] for line in station.lines] == [
        f"new image: {question.text}" for question in QUESTIONS
    ]
    assert not station.records()


def test_a_damaged_product_goes_into_quarantine(station: Station) -> None:
    station.land("bad.tif", "bad")
    station.land("good.tif", "good")
    worker = station.run()
    assert (worker.answered, worker.quarantined) == (2, 1)
    (record,) = station.records()
    facts = json.loads(record.read_text())
    assert facts["product"] == "bad.tif"
    assert facts["reason"] == "bad.tif is damaged"
    assert (facts["exit_code"], facts["attempts"]) == (3, 3)
    assert (station.root / "bad.tif").exists()
    assert [line for line in station.told if "trying again in" in line] == [
        "bad.tif: bad.tif is damaged; trying again in 10 s",
        "bad.tif: bad.tif is damaged; trying again in 20 s",
    ]
    assert station.run().quarantined == 0  # It stays there.
    journal = Journal(station.out)
    assert journal.release() == 1
    journal.close()
    assert station.run().quarantined == 1
    station.land("bad.tif", "mended")
    assert station.run().answered == 2


def test_a_product_is_moved_where_that_is_asked(tmp_path: Path) -> None:
    station = Station(tmp_path, move_to=tmp_path / "away", retries=0)
    station.land("bad.tif", "bad")
    station.land("bad.tfw")
    assert station.run().quarantined == 1
    assert os.listdir(station.root) == []
    (folder,) = (tmp_path / "away").iterdir()
    assert sorted(os.listdir(folder)) == ["bad.tfw", "bad.tif"]


def test_a_move_that_was_killed_half_way_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    station = Station(tmp_path, move_to=tmp_path / "away", retries=0)
    station.land("bad.tif", "bad")
    station.land("bad.tfw")
    real = os.rename

    def once(source: Path, target: Path) -> None:
        real(source, target)
        raise Killed

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(Killed):
        station.run()
    monkeypatch.setattr(os, "rename", real)
    assert station.run().quarantined == 1
    (folder,) = (tmp_path / "away").iterdir()
    assert sorted(os.listdir(folder)) == ["bad.tfw", "bad.tif"]


@pytest.mark.parametrize("installed", [True, False])
def test_the_system_wakes_the_loop_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed:
        pytest.importorskip("watchfiles", reason="needs the `watch` extra")
    else:
        monkeypatch.setitem(sys.modules, "watchfiles", None)
    woken = threading.Event()
    waking = Waking()
    monkeypatch.setattr(waking, "wake", woken.set)
    with notices(tmp_path, waking) as how:
        assert how.startswith("as the system tells" if installed else "by looking")
        # The system may need a moment before it tells anything.
        for number in range(100 if installed else 0):
            (tmp_path / f"{number}.tif").write_text("x")
            if woken.wait(0.5):
                break
    assert woken.is_set() == installed


def test_a_wait_ends_when_it_is_woken() -> None:
    waking = Waking()
    waking.wake()
    waking.wait(3600)
    began = waking.monotonic()
    waking.wait(0)
    assert waking.monotonic() - began < 60
    assert waking.now() > 1_700_000_000


def test_a_product_has_a_time_limit(station: Station) -> None:
    station.land("slow.tif")
    station.asker.cost = station.settings.time_limit + 1
    assert station.run().quarantined == 0  # An answer is progress: the next attempt goes on.
    assert set(station.asker.asked.values()) == {1}
    assert station.records() == []


def test_a_time_limit_that_no_attempt_keeps_ends_in_quarantine(tmp_path: Path) -> None:
    station = Station(tmp_path, time_limit=5.0)
    station.land("slow.tif")
    station.asker.open_cost = 6
    assert station.run().quarantined == 1
    facts = json.loads(station.records()[0].read_text())
    assert facts["exit_code"] == 6
    assert "--time-limit" in facts["reason"]


@pytest.mark.parametrize("error", [BackendError("no"), QuestionError("too long")])
def test_what_is_not_the_products_fault_ends_the_command(
    station: Station, error: Exception
) -> None:
    station.land("a.tif")
    station.asker.error = error
    with pytest.raises(type(error)):
        station.run()
    station.asker.error = None
    assert station.run().answered == 2


def test_what_nobody_foresaw_is_the_products_fault(station: Station) -> None:
    station.land("a.tif")
    station.asker.error = RuntimeError("huh")
    assert station.run().quarantined == 1
    assert "RuntimeError: huh" in station.records()[0].read_text()


def all_steps(place: Path) -> list[str]:
    station = Station(place, hook=Hook((sys.executable, "-c", "", "{json}"), 60), retries=1)
    steps: list[str] = []
    station.land("a.tif", "one")
    station.land("bad.tif", "bad")
    station.run(steps.append)
    return steps


def test_a_kill_at_every_step_loses_nothing_and_answers_nothing_twice(tmp_path: Path) -> None:
    steps = all_steps(tmp_path)
    expected = sorted((tmp_path / "out" / "results").iterdir())
    assert len(steps) > 20
    for number in range(len(steps)):
        place = tmp_path / str(number)
        place.mkdir()
        station = Station(place, retries=1)
        station.land("a.tif", "one")
        station.land("bad.tif", "bad")
        left = number

        def step(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            station.run(step)
        except Killed:
            station.run()
        assert station.results() == [path.name for path in expected], steps[number]
        assert len(station.records()) == 1
        # A reply that was not in the journal yet has left no trace, and is made again.
        most = 2 if steps[number] == "replied" else 1
        assert set(station.asker.asked.values()) <= {1, most}, steps[number]
        assert len(set(station.lines)) == 2
        assert len(station.lines) <= (3 if steps[number] == "line" else 2)


def test_kills_over_and_over_put_nothing_into_quarantine(station: Station) -> None:
    for name in "abc":
        station.land(f"{name}.tif", name)
    kills = 0
    for _ in range(200):
        seen = 0

        def step(_: str) -> None:
            nonlocal seen
            seen += 1
            if seen > 3:
                raise Killed

        try:
            station.run(step)
            break
        except Killed:
            kills += 1
    assert kills > 5
    assert len(station.results()) == 12
    assert station.records() == []


def test_a_product_that_kills_the_process_is_given_up_and_stops_no_other(station: Station) -> None:
    station.land("a.tif", "kills")
    station.land("b.tif", "fine")
    for _ in range(MAX_UNFINISHED + 5):

        def step(name: str) -> None:
            if name == "found" and len(station.lines) < 2:
                return
            if name == "begun":
                raise Killed

        try:
            station.run(step)
        except Killed:
            continue
    station.run()
    assert {json.loads(line)["product"] for line in station.lines} >= {"b.tif"}
    assert len(station.lines) + 2 * len(station.records()) == 4


DRIVER = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.watching import Station, without_syncing
without_syncing(pytest.MonkeyPatch())
left = int(sys.argv[2])
station = Station(Path(sys.argv[1]))
def write(line):
    sys.stdout.write(line)
    sys.stdout.flush()
class Lines(list):
    append = staticmethod(write)
station.lines = Lines()
def step(_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
station.run(step)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_real_kill_at_step_after_step(tmp_path: Path) -> None:
    station = Station(tmp_path)
    for name in "ab":
        station.land(f"{name}.tif", name)
    lines: list[str] = []
    for life in range(1, 60):
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path), str(life)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines += done.stdout.splitlines()
        assert done.returncode in (0, -9), done.stderr
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert len(set(lines)) == 4
    assert len(station.results()) == 8
    assert station.records() == []
    assert all(json.loads(path.read_text()) for path in (tmp_path / "out" / "results").iterdir())


def test_a_full_disk_loses_no_answer(station: Station, monkeypatch: pytest.MonkeyPatch) -> None:
    station.land("a.tif")
    real = results_module.replacing

    def full(target: Path) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(results_module, "replacing", full)
    with pytest.raises(JournalError, match="No space left"):
        station.run()
    assert station.results() == []
    assert station.lines == []
    assert sum("trying again" in line for line in station.told) == station.settings.retries
    monkeypatch.setattr(results_module, "replacing", real)
    station.run()
    assert len(station.results()) == 4
    assert set(station.asker.asked.values()) == {1}
    assert station.records() == []


def test_the_loop_outlives_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    station = Station(tmp_path, once=False)
    station.land("a.tif")
    real, fails = results_module.replacing, [True] * 7

    def full(target: Path) -> object:
        if fails:
            fails.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return real(target)

    monkeypatch.setattr(results_module, "replacing", full)
    workers: list[Worker] = []
    original = Worker.run

    def run(worker: Worker) -> None:
        workers.append(worker)
        original(worker)

    monkeypatch.setattr(Worker, "run", run)
    station.time.events = [lambda: None] * 20 + [lambda: Worker.stop(workers[0])]
    station.run()
    assert len(station.lines) == 2
    assert set(station.asker.asked.values()) == {1}


def test_a_full_disk_under_the_journal_is_no_fault_of_the_products(station: Station) -> None:
    station.land("a.tif")
    journal = Journal(station.out)
    (size,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal.close()
    real = Journal.begin

    def begin(self: Journal, path: str, signature: str, now: float) -> None:
        self._db.execute(f"PRAGMA max_page_count = {size}")
        real(self, path, signature, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "begin", begin)
        station.land("a.tif", "x" * 100_000)
        with pytest.raises(JournalError, match="full"):
            station.run()
    assert station.records() == []
    assert station.run().answered == 2


def test_two_processes_do_not_share_a_journal(station: Station) -> None:
    journal = Journal(station.out)
    with pytest.raises(JournalError, match="another `lrs-edge watch`"):
        Journal(station.out)
    journal.close()
    (station.out / "watch.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(station.out)


def test_hooks_get_arguments_and_no_shell(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f"import sys; open({str(log)!r}, 'a').write(repr(sys.argv[1:]) + chr(10))"
    station = Station(tmp_path, hook=Hook((sys.executable, "-c", script), 60))
    name = "$(touch owned); rm -rf x {geojson}.tif"
    station.land(name)
    station.run()
    (first, second) = log.read_text().splitlines()
    assert first != second
    assert first == repr([json.loads(station.lines[0])["json"]])
    hook = Hook(("p", "--of={product}", "{question_id} {json}"), 1)
    values = {"json": "J", "geojson": "G", "product": f"/in/{name}", "question_id": "{json}"}
    assert hook.command(values) == ["p", f"--of=/in/{name}", "{json} J"]
    assert read_hook("true 'a b' $HOME", 1).arguments == ("true", "a b", "$HOME")
    for bad in ("", "'", "no-such-program-here x"):
        with pytest.raises(UsageError, match="--hook"):
            read_hook(bad, 1)


def test_a_hook_that_fails_or_hangs_stops_nothing(tmp_path: Path) -> None:
    values = dict.fromkeys(("json", "geojson", "product", "question_id"), "x")
    assert Hook((sys.executable, "-c", "raise SystemExit(3)"), 60).run(values) == 3
    assert Hook((sys.executable, "-c", "while True: pass"), 0.2).run(values) == TIMED_OUT
    assert Hook(("/no/such/program",), 1).run(values) == NOT_STARTED
    station = Station(tmp_path, hook=Hook((sys.executable, "-c", "raise SystemExit(3)"), 60))
    station.land("a.tif")
    assert station.run().answered == 2
    assert "a.tif: the hook ended with exit code 3" in station.told
    station.run()
    assert sum("exit code 3" in line for line in station.told) == 2


@pytest.mark.parametrize(
    "name",
    [
        "x..%2f..%2fx.tif",
        "a...tif",
        "a" * 240 + ".tif",
        "CON.tif",
        "\udcff\n\x1b[2J.tif",
        "-rf.tif",
    ],
)
def test_names_of_results_cannot_leave_the_folder(station: Station, name: str) -> None:
    station.land(name)
    station.run()
    for written in station.results():
        assert written.isascii()
        assert "/" not in written
        assert not written.startswith((".", "-"))
        assert len(written) < 200
    assert len(station.results()) == 4
    json.loads(station.lines[0])


def test_names_are_of_their_product_alone() -> None:
    assert product_name("a/b.tif", "0") != product_name("a_b.tif", "0")
    assert product_name("../../etc/passwd", "0").startswith("etc_passwd-")
    assert "/" not in result_name("../x", "0", "../../y", "f" * 64)


def found(root: Path, **patterns: tuple[str, ...]) -> dict[str, object]:
    return {product.path: product for product in scan(root, Patterns(**patterns))}


def test_sidecars_folders_and_what_is_not_finished(station: Station) -> None:
    for name in (
        *("a.tif", "a.tif.aux.xml", "a.TFW", "b.tif.part", ".hidden.tif", "notes.txt"),
        *("S2A.SAFE/manifest.safe", "S2A.SAFE/GRANULE/L1/IMG_DATA/T_TCI.jp2"),
        "S2A.SAFE/GRANULE/L1/IMG_DATA/T_B02.jp2",
        "S2B.SAFE/GRANULE/L1/x.jp2.part",
    ):
        station.land(name)
    (station.root / "link.tif").symlink_to("/etc/passwd")
    (station.root / "loop").symlink_to(station.root)
    products = scan(station.root, Patterns())
    named = {product.path: product for product in products}
    assert sorted(named) == ["S2A.SAFE", "S2B.SAFE", "a.tif"]
    assert [part.path for part in named["a.tif"].parts] == ["a.TFW", "a.tif", "a.tif.aux.xml"]
    assert named["S2A.SAFE"].image == os.path.join(
        "S2A.SAFE", "GRANULE", "L1", "IMG_DATA", "T_TCI.jp2"
    )
    assert named["S2B.SAFE"].missing
    assert list(found(station.root, files=("*.txt",), folders=("none",))) == ["notes.txt"]


def test_a_product_waits_for_what_belongs_to_it(tmp_path: Path) -> None:
    station = Station(tmp_path, patterns=Patterns(wait_for=("{stem}.xml",)))
    station.land("a.tif")
    assert station.run().answered == 0
    assert "a.tif: waits for a.xml" in station.told
    station.land("a.xml")
    assert station.run().answered == 2


def test_products_settle_by_a_clock_that_nobody_sets(station: Station) -> None:
    station.land("a.tif")
    settling = Settling(2.0)
    assert settling.update(scan(station.root, Patterns()), 10) == []
    assert settling.next_look(10) == 2
    assert settling.update(scan(station.root, Patterns()), 11) == []
    assert len(settling.update(scan(station.root, Patterns()), 12)) == 1
    assert not settling.is_waiting(12)


def test_a_product_that_becomes_whole_right_after_a_look_is_asked(station: Station) -> None:
    class Ticking(FakeTime):
        def monotonic(self) -> float:
            self.seconds += 0.1
            return self.seconds

        def wait(self, seconds: float) -> None:
            # Woken a little early, so that the last look before the product is whole comes late.
            super().wait(seconds - 0.15)

    station.time = Ticking()
    station.land("a.tif")
    assert station.run().answered == 2


def test_ids_of_questions_are_stable(tmp_path: Path) -> None:
    path = tmp_path / "questions"
    path.write_text("# ours\nHow many ships?\n\n  Is there a bridge? \n")
    first = read_questions(path)
    path.write_text("A new one?\nIs there a bridge?\nHow many ships?\n")
    assert set(first) < set(read_questions(path))
    path.write_text('{"question_id": 7, "text": "Ships?", "image": "x.tif"}\n{"text": "Other?"}\n')
    assert read_questions(path)[0].id == "7"
    rows = '[{"question_id": "a", "text": "One?"}, {"question_id": "a", "text": "Two?"}]'
    for bad in ("", "# nothing\n", '{"text": ""}', '{"text": 1', rows, "x" * 100_000):
        path.write_text(bad)
        with pytest.raises(UsageError, match="questions"):
            read_questions(path)
