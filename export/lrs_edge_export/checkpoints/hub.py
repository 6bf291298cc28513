"""Checkpoints on the Hugging Face hub: what is fetched, and what is refused before it is.

A repository's files are listed first. Configs and tokenizer come next, a few megabytes at most, so
that a checkpoint that cannot be used is refused before its weights are fetched; then safetensors
files, those that the index names. Nothing executable is fetched, and no pickle. What has arrived
is kept in the hub's own cache (`HF_HOME`), and a download that broke off goes on.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from lrs_edge.errors import ExportError

#: Small files that are fetched, by their names in the root or in a folder of a tower.
_SMALL = (
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "MODEL_CARD.md",
)

#: Small files that no export reads: of other frameworks, of training, and weight indexes of them.
_LEFT = ("trainer_state.json", "training_args.json", "all_results.json", "*onnx*.json")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

#: A listed small file of more bytes is no config and no tokenizer.
_MOST_SMALL = 64 << 20

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

#: Told of what is done, one line a step.
Tell = Callable[[str], None]

#: Looks at a folder of configs before weights are fetched; raises ExportError.
Look = Callable[[Path], None]


def is_hub_name(name: str) -> bool:
    """True for `owner/model`, or `owner/model@revision`, that cannot be a path."""
    parts = name.partition("@")[0].split("/")
    return len(parts) == 2 and all(part and part[0] not in ".~" for part in parts)


def unknown(name: str) -> ExportError:
    """The error for a name that can be none of what a checkpoint is called by."""
    return ExportError(
        f"{name} is neither a folder, nor a recipe (`lrs-edge models recipes` lists them), nor a "
        "hub name such as owner/model"
    )


def download(name: str, look: Look | None = None, tell: Tell = lambda _: None) -> Path:
    """Fetch a repository from the hub, as far as an export reads it.

    Args:
        name: `owner/model`, or `owner/model@revision`.
        look: Looks at configs and tokenizer before any weights are fetched.
        tell: Told of the sizes.

    Returns:
        The folder in the hub's cache. Without a network, or with HF_HUB_OFFLINE, what is there.

    Raises:
        ExportError: The name cannot be one, the download fails, or the repository holds weights in
            pickles only.
    """
    if not is_hub_name(name):
        raise unknown(name)
    import huggingface_hub

    repository, _, wanted = name.partition("@")
    revision = wanted or None
    listed, problem = _listing(name, repository, revision)
    if listed is None:
        return _from_cache(name, repository, revision, problem)
    _refuse_pickles(name, listed)
    fetch = Fetch(huggingface_hub.snapshot_download, name, repository, revision)
    small = [path for path, size in listed.items() if _is_small(path, size)]
    folder = fetch(small)
    if look is not None:
        look(folder)
    weights = _weights(folder, listed)
    total = sum(listed[path] for path in weights)
    tell(f"fetching {name}: {len(weights)} files of weights, {total / 1e9:.2f} GB")
    return fetch([*small, *weights])


class Fetch:
    """Fetches named files; the client shows progress and goes on where it stopped."""

    def __init__(
        self, fetch: Callable[..., Any], name: str, repository: str, revision: str | None
    ) -> None:
        self._fetch = fetch
        self._name = name
        self._repository = repository
        # As the user named it: the client remembers under this name, for when there is no network.
        self._revision = revision

    def __call__(self, paths: list[str]) -> Path:
        """The folder with these files. Raises ExportError."""
        # Names are patterns to the client.
        patterns = [path.replace("[", "[[]") for path in paths]
        try:
            return Path(
                self._fetch(self._repository, revision=self._revision, allow_patterns=patterns)
            )
        # The hub's client raises errors of several libraries (HTTP, validation, disk).
        except Exception as error:
            raise _not_downloaded(self._name, error) from error


def _listing(
    name: str, repository: str, revision: str | None
) -> tuple[dict[str, int] | None, Exception | None]:
    """Size of each file; or why none is known, where the cache may still serve."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None, None
    try:
        found = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True
        )
    except Exception as error:
        if {kind.__name__ for kind in type(error).__mro__} & _FINAL:
            raise _not_downloaded(name, error) from error
        return None, error
    return {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}, None


def _from_cache(
    name: str, repository: str, revision: str | None, problem: Exception | None
) -> Path:
    """What an earlier download left. Raises ExportError."""
    import huggingface_hub

    try:
        # The client would ask for all that the repository has; what an export needs besides is
        # looked for when it is read.
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except Exception as error:
        raise _not_downloaded(name, problem or error) from error
    return Path(folder)


def _refuse_pickles(name: str, sizes: dict[str, int]) -> None:
    """Refuse a repository without safetensors, before anything is fetched. Raises ExportError."""
    if any(path.endswith(".safetensors") for path in sizes):
        return
    pickles = [path for path in sizes if path.endswith(_PICKLES)]
    if pickles:
        raise ExportError(
            f"{name} holds no safetensors files on the hub, only pickles ({pickles[0]}), which can "
            "run code and are never fetched. Name a revision that holds them (its page lists pull "
            f"requests that convert it: --revision refs/pr/N, or {name.partition('@')[0]}"
            "@refs/pr/N for a tower); or put its files into a folder yourself and name that"
        )
    raise ExportError(f"{name} holds no safetensors files on the hub; name another checkpoint")


def _is_small(path: str, size: int) -> bool:
    place = PurePosixPath(path)
    if len(place.parts) > 2 or any(part.startswith(".") for part in place.parts):
        return False
    named = any(fnmatch.fnmatch(place.name, pattern) for pattern in _SMALL)
    left = any(fnmatch.fnmatch(place.name, pattern) for pattern in _LEFT)
    foreign = place.name.endswith(".index.json") and place.name != _INDEX
    return named and not left and not foreign and size <= _MOST_SMALL


def _weights(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Weight files of the root, and of folders in it that hold a config of their own.

    Raises:
        ExportError: An index names files that the repository does not hold.
    """
    places = [""]
    places += sorted({f"{p.parent.name}/" for p in folder.glob("*/config.json")})
    found: list[str] = []
    for place in places:
        if f"{place}{_INDEX}" in sizes:
            index = folder / place / _INDEX
            try:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                shards = sorted(f"{place}{name}" for name in names)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ExportError(f"{index} is not a weight index; download it again") from error
            missing = [name for name in shards if name not in sizes]
            if missing:
                raise ExportError(
                    f"{index} names {missing[0]}, which its repository does not hold; name another "
                    "revision"
                )
            found += shards
        elif f"{place}{_SINGLE}" in sizes:
            found.append(f"{place}{_SINGLE}")
    if not found:
        others = [path for path in sizes if path.endswith(".safetensors")]
        raise ExportError(
            f"{folder}: its repository holds {others[0]}, but no {_SINGLE} and no {_INDEX}; it is "
            "no checkpoint of transformers"
        )
    return found


#: Errors that the cache does not help with.
_FINAL = {"GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}

#: What to do, by the names of the client's errors: it has no type of its own for each everywhere.
_ADVICE = {
    "GatedRepoError": "accept its terms on its page, then log in (`hf auth login`) or set HF_TOKEN",
    "RepositoryNotFoundError": "check the name; a private one needs `hf auth login` or HF_TOKEN",
    "RevisionNotFoundError": "check the revision",
    "LocalEntryNotFoundError": "it is not in the cache: check the network, and HF_HUB_OFFLINE",
    "OfflineModeIsEnabled": "it is not in the cache: unset HF_HUB_OFFLINE",
}


def _not_downloaded(name: str, error: Exception) -> ExportError:
    """All that the hub's client says, on one line, and what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    kinds = (kind.__name__ for kind in type(error).__mro__)
    known = next((_ADVICE[kind] for kind in kinds if kind in _ADVICE), None)
    advice = known or "try again: what has arrived is kept; or download it yourself"
    return ExportError(
        f"{name} is not a local folder, and cannot be downloaded from the hub: {reason} ({advice})"
    )
