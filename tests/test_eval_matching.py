"""What counts as right, against what the authors' scorers would say."""

from __future__ import annotations

import gc
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from lrs_edge.errors import LrsEdgeError
from lrs_edge.evaluation import wordnet
from lrs_edge.evaluation.matching import Matcher, chosen_letter, normalise
from lrs_edge.evaluation.wordnet import WordNet
from tests.evaluation import WORDNET, private_wordnet

CHOICES = ("(A) 12 ships", "(B) 3 ships", "(C) a harbor", "(D) blue", "(E) None of these")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    return WordNet(private_wordnet(tmp_path_factory.mktemp("wn")))


def test_normalisation() -> None:
    assert normalise("  Bare \n Land ") == "bare land"
    assert Matcher(None).match("RURAL", "rural ") == "exact"
    # The authors cut no punctuation.
    assert Matcher(None).match("rural.", "rural") is None
    assert Matcher(None).match("two", "2") is None


@pytest.mark.parametrize(
    ("first", "second", "similarity"),
    [
        ("two", "2", 1.0),
        ("ship", "ships", 1.0),
        ("harbor", "harbour", 1.0),
        ("gray", "grey", 1.0),
        ("car", "automobile", 1.0),
        ("manned", "man", 1.0),
        ("center", "middle", 1.0),
        ("wharf", "dock", 1.0),
        # One step apart is 1 / (1 + 1): never above 0.8.
        ("ship", "vessel", 0.5),
        ("boat", "ship", 1 / 3),
        ("dock", "harbor", 0.25),
        ("qwertz", "ship", 0.0),
        # As in the authors' scorer: words with a space between are not an entry of WordNet.
        ("gray ship", "grey ship", 0.0),
        ("", "ship", 0.0),
    ],
)
def test_path_similarity_of_wordnet_3(
    words: WordNet, first: str, second: str, similarity: float
) -> None:
    assert words.similarity(first, second) == pytest.approx(similarity)
    assert words.similarity(second, first) == pytest.approx(similarity)
    found = Matcher(words).match(first, second)
    assert found == ("synonym" if similarity > 0.8 else None)


def test_synonyms_count_only_where_asked_for(words: WordNet) -> None:
    assert words.description == "WordNet 3.0"
    assert Matcher(words).match("Automobile", "CAR") == "synonym"
    assert Matcher(words).match("car", "CAR") == "exact"
    assert Matcher(None).match("automobile", "car") is None


def test_the_small_wordnet_says_what_the_whole_one_says(words: WordNet) -> None:
    if not (wordnet.SYSTEM_FOLDER / "data.noun").is_file():
        pytest.skip("Debian's wordnet-base is not installed")
    whole = WordNet(wordnet.SYSTEM_FOLDER)
    known = ("two", "2", "ship", "harbor", "harbour", "dock", "wharf", "car", "gray", "man", "yes")
    for first in known:
        for second in known:
            assert words.similarity(first, second) == whole.similarity(first, second)


def test_a_folder_that_is_no_wordnet(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    with pytest.raises(LrsEdgeError, match=r"does not hold WordNet: data.noun.*--no-synonyms"):
        WordNet(tmp_path)
    damaged = private_wordnet(tmp_path)
    (damaged / "index.noun").write_text("ship n x\n")
    with pytest.raises(LrsEdgeError, match="cannot be read as WordNet"):
        WordNet(damaged)


def test_a_damaged_wordnet_is_told_when_a_word_is_looked_up(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    damaged = private_wordnet(tmp_path)
    (damaged / "data.noun").write_text("nothing\n" * 2000)
    with pytest.raises(LrsEdgeError, match="damaged"):
        WordNet(damaged).similarity("ship", "vessel")


def test_files_that_other_packages_leave_out_are_not_needed(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    folder = private_wordnet(tmp_path)
    for path in folder.glob("*.exc"):
        path.unlink()
    found = WordNet(folder)
    assert found.similarity("ships", "ship") == 1.0
    assert found.similarity("manned", "man") == 0.0


def test_without_wordnet_or_nltk_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk_data = pytest.importorskip("nltk.data", reason="synonyms need the `eval` extra")
    monkeypatch.setattr(nltk_data, "path", [str(tmp_path)])
    monkeypatch.setattr(wordnet, "SYSTEM_FOLDER", tmp_path / "none")
    with pytest.raises(LrsEdgeError, match=r"no WordNet.*--wordnet.*--no-synonyms"):
        WordNet()
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.data", None)
    with pytest.raises(LrsEdgeError, match=r"pip install '\.\[cpu,eval\]'.*--no-synonyms"):
        WordNet()


@pytest.mark.parametrize("packed", [False, True])
def test_nltk_s_own_data_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    nltk_data = pytest.importorskip("nltk.data", reason="synonyms need the `eval` extra")
    corpora = tmp_path / "corpora"
    corpora.mkdir(mode=0o700)
    folder = private_wordnet(corpora)
    if packed:
        shutil.make_archive(str(corpora / "wordnet"), "zip", corpora, "wordnet")
        (corpora / "wordnet.zip").chmod(0o600)
        shutil.rmtree(folder)
    monkeypatch.setattr(nltk_data, "path", [str(tmp_path)])
    assert WordNet().similarity("car", "automobile") == 1.0


def test_the_licence_goes_with_the_words() -> None:
    for path in [*WORDNET.glob("data.*"), *WORDNET.glob("index.*")]:
        assert "Copyright 2006 by Princeton University" in path.read_text()


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("(B) 3 ships", "B"),
        ("The best answer is D.", "D"),
        ("The answer is: (E)", "E"),
        ("  a harbor ", "C"),
        ("blue", "D"),
        ("green", ""),
        ("it is one of those that lie in the north of the town", ""),
        ("it is one of those that lie in the north of the town: B", "B"),
        # The first capital of A to E counts, wherever it is: so it is in their scorer.
        ("An answer could be C", "A"),
        # Commas are missing in the authors' list, so that these phrases are not cut.
        ("Best answer: C", "B"),
        ("The best option is C", "C"),
        # What is cut off before it names anything is not a choice; their scorer takes the first.
        *((cut, "") for cut in ("", " ", "(", "The answer is", "The best answer is.", "...")),
    ],
)
def test_letters_are_found_as_the_authors_find_them(answer: str, letter: str) -> None:
    assert chosen_letter(answer, CHOICES) == letter
    assert Matcher(None).match(answer, "C", CHOICES) == ("choice" if letter == "C" else None)


def test_no_file_of_wordnet_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("nltk", reason="synonyms need the `eval` extra")
    folder = private_wordnet(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        words = WordNet(folder)
        assert words.similarity("ship", "ships") == 1.0
        del words
        (folder / "index.verb").write_text("nothing of the sort\n")
        with pytest.raises(LrsEdgeError, match="cannot be read as WordNet"):
            WordNet(folder)
        gc.collect()
    assert [str(w.message) for w in told if w.category is ResourceWarning] == []
