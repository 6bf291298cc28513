"""Makes the small WordNet beside this file: some words of WordNet 3.0 with all their senses.

    python tests/wordnet/extract.py /usr/share/wordnet

Synsets of the words and everything above them are taken over as they are, but for their numbers
(places in the file) and for pointers to synsets that are left out. The licence is in every file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORDS = [
    "2",
    "two",
    "ship",
    "vessel",
    "boat",
    "harbor",
    "harbour",
    "wharf",
    "dock",
    "car",
    "automobile",
    "grey",
    "gray",
    "center",
    "middle",
    "man",
    "rural",
    "rustic",
    "yes",
]
PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


def main(source: Path) -> None:
    for part, letter in PARTS.items():
        lines = (source / f"data.{part}").read_text(encoding="utf-8").splitlines()
        licence = [line for line in lines if line.startswith("  ")]
        synsets = {line[:8]: line for line in lines if not line.startswith("  ")}
        index = {
            line.split()[0]: line.split()
            for line in (source / f"index.{part}").read_text(encoding="utf-8").splitlines()
            if not line.startswith("  ")
        }
        words = [word for word in sorted(WORDS) if word in index]
        wanted, todo = set(), [o for word in words for o in index[word] if o in synsets]
        while todo:
            offset = todo.pop()
            if offset not in wanted:
                wanted.add(offset)
                todo += [target for sign, target, *_ in upward(synsets[offset])]
        kept = {offset: trimmed(synsets[offset], wanted, letter) for offset in sorted(wanted)}
        place, places = sum(len(line.encode()) + 1 for line in licence), {}
        for offset, line in kept.items():
            places[offset] = f"{place:08d}"
            place += len(line.encode()) + 1
        body = [renumbered(line, places) for line in kept.values()]
        write(HERE / f"data.{part}", licence + body)
        write(HERE / f"index.{part}", licence + index_rows(kept, places, index, letter))
        exceptions = (source / f"{part}.exc").read_text(encoding="utf-8").splitlines()
        write(HERE / f"{part}.exc", [e for e in exceptions if set(e.split()[1:]) & set(WORDS)])


def pointers(line: str) -> list[list[str]]:
    """Sign, offset, part of speech and words of every pointer of a synset."""
    fields = line.split("|", maxsplit=1)[0].split()
    start = 4 + 2 * int(fields[3], 16)
    count = int(fields[start])
    return [fields[i : i + 4] for i in range(start + 1, start + 1 + 4 * count, 4)]


def upward(line: str) -> list[list[str]]:
    """Pointers to what is above a synset; above a satellite adjective is its head."""
    signs = {"@", "@i", "&"} if line.split()[2] == "s" else {"@", "@i"}
    return [pointer for pointer in pointers(line) if pointer[0] in signs]


def trimmed(line: str, wanted: set[str], letter: str) -> str:
    """A synset without pointers to what is left out."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    start = 4 + 2 * int(fields[3], 16)
    end = start + 1 + 4 * int(fields[start])
    kept = [p for p in upward(line) if p[1] in wanted and p[2] == letter]
    middle = [f"{len(kept):03d}", *(field for pointer in kept for field in pointer)]
    return f"{' '.join([*fields[:start], *middle, *fields[end:]])} |{gloss}"


def index_rows(
    kept: dict[str, str], places: dict[str, str], index: dict[str, list[str]], letter: str
) -> list[str]:
    """Every word of the kept synsets with those of its senses that were kept, in their order."""
    lemmas = {
        re.sub(r"\(\w+\)$", "", word).lower() for line in kept.values() for word in words_of(line)
    }
    rows = []
    for lemma in sorted(lemmas):
        senses = [places[field] for field in index[lemma] if field in places]
        rows.append(
            " ".join([lemma, letter, str(len(senses)), "0", str(len(senses)), "0", *senses])
        )
    return rows


def words_of(line: str) -> list[str]:
    fields = line.split()
    return fields[4 : 4 + 2 * int(fields[3], 16) : 2]


def renumbered(line: str, places: dict[str, str]) -> str:
    head, bar, gloss = line.partition("|")
    return " ".join(places.get(field, field) for field in head.split(" ")) + bar + gloss


def write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
