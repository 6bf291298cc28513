"""A trace of every stage of one question, for comparison with the reference implementation.

Arrays are named as in the golden files of the authors' code: s = 1 for the base level, s = 2 for
the next (`full` goes on counting). Level sizes stand under `scale_infos_*`, coarse to fine, as in
the golden `scale_infos`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrs_edge.answer.confidence import Certainty
from lrs_edge.engines.rows import Embeds, joined
from lrs_edge.errors import UsageError
from lrs_edge.files import check_replaceable, replacing
from lrs_edge.language.kv_cache import Tokens
from lrs_edge.language.prompt import IMAGE_TOKEN, PromptTokens
from lrs_edge.language.sequence import TokenSequence
from lrs_edge.pyramid.levels import Pyramid
from lrs_edge.search.result import LevelPass, SearchResult


class Trace:
    """Collects arrays and writes them as one `.npz` file."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def put(self, name: str, values: Any) -> None:
        """Add one array."""
        self.arrays[name] = np.asarray(values)

    def add_prompt(self, tokens: PromptTokens) -> None:
        """`input_ids`, with -200 for the image."""
        parts = (
            tokens.before,
            tokens.after[: tokens.view],
            [IMAGE_TOKEN],
            tokens.after[tokens.view :],
        )
        ids = np.concatenate(parts)
        self.put("input_ids", ids.astype(np.int64))

    def add_pyramid(self, pyramid: Pyramid) -> None:
        """Sizes (height, width) of all levels, of the searched ones and of the global view."""
        levels = pyramid.all_levels
        self.put("scale_infos_resize_hw", [(lv.height, lv.width) for lv in levels])
        self.put(
            "scale_infos_resize_padding_hw", [(lv.padded_height, lv.padded_width) for lv in levels]
        )
        self.put("scale_infos_block_num_hw", [(lv.tile_rows, lv.tile_cols) for lv in levels])
        places = {id(level): place for place, level in enumerate(levels)}
        self.put("searched_levels", [places[id(level)] for level in pyramid.levels])
        view = pyramid.global_view
        self.put("global_resize_hw", (view.height, view.width))

    def add_global(self, tokens: Embeds) -> None:
        """Every 32nd token of the projected global view."""
        self.put("proj_global_rows32", np.asarray(tokens[::32]))

    def add_search(self, result: SearchResult, prefix: TokenSequence, after: Embeds) -> None:
        """Scores, selected tiles and kept tokens of every level.

        `rfm{s}_*` are the scores of whatever scored; levels whose tokens were all taken have none.
        """
        for number, scored in enumerate(result.passes, start=1):
            self._add_pass(number, scored, prefix, after)
        if len(result.passes) > 1:
            first, second = result.passes[0], result.passes[1]
            self.put("next_selected_positions", [(t.row, t.col) for t in second.tiles])
            self.put("next_lvl_index_used", second.index)
            self.put("next_local_mask", (~second.local.hidden).astype(np.uint8))
            self.put("topk1_indices_with_newlines", first.local.indices[first.kept])

    def _add_pass(
        self, number: int, scored: LevelPass, prefix: TokenSequence, after: Embeds
    ) -> None:
        local = scored.local
        embeds = np.asarray(joined([prefix.embeds, local.embeds, after]))
        self.put(f"seq{number}_rownorm", np.linalg.norm(embeds, axis=1))
        self.put(f"seq{number}_rowsum", embeds.sum(axis=1))
        self.put(f"seq{number}_local_hw_incl_newline", (scored.grid.rows, scored.grid.width))
        if scored.is_scored:
            self.put(f"rfm{number}_logits_heads", scored.logits)
            self.put(f"rfm{number}_attn", scored.scores)
        self.put(f"rfm{number}_local_indices", local.indices)
        self.put(f"rfm{number}_tiles", [(tile.row, tile.col) for tile in scored.tiles])
        self.put(f"topk{number}_raw_indices", local.indices[scored.top])
        self.put(f"keep{number}_indices_with_newlines", local.indices[scored.kept])
        if number > 1:
            self.put(f"rfm{number}_bool_mask_added", local.hidden.astype(np.uint8))
            masked = scored.scores if scored.masked_scores is None else scored.masked_scores
            self.put(f"rfm{number}_attn_if_properly_masked", masked)

    def add_way(self, search: str, prune: str) -> None:
        """`search` and `prune` as they were asked for, strings [1]."""
        self.put("search", [search])
        self.put("prune", [prune])

    def add_segments(self, tokens: Iterable[Tokens]) -> None:
        """Positions of the prompt's tokens that each segment of the language model saw."""
        for number, seen in enumerate(tokens):
            self.put(f"segment{number}_positions", seen["position"].astype(np.int64))

    def add_note(self, text: str, ids: NDArray[np.int64]) -> None:
        """What the detector found, as the language model is told: the text, and token ids [m]."""
        self.put("objects_text", [text])
        self.put("objects_ids", ids)

    def add_final(self, sequence: TokenSequence) -> None:
        """The sequence given to the language model."""
        self.put("final_embeds_rownorm", np.linalg.norm(sequence.values, axis=1))
        self.put("final_embeds_rowsum", sequence.values.sum(axis=1))
        self.put("prefill_position_ids", sequence.tokens["position"].astype(np.int64))
        self.put("prefill_attention_mask", np.ones(len(sequence), np.int64))

    def add_decode(self, logits: list[NDArray[np.float32]], token_ids: list[int]) -> None:
        """Logits of every step and the generated ids, a stop token included."""
        self.put("new_ids", np.array(token_ids, np.int64))
        if logits:
            self.put("prefill_last_logits", logits[0])
            self.put("step_logits", np.stack(logits))

    def add_confidence(self, found: Certainty, confidence: float | None) -> None:
        """`confidence`, `margin` and log-probabilities of the answer, those that it has."""
        known = {"confidence": confidence, **asdict(found)}
        for name, value in known.items():
            if value is not None:
                self.put(name, value)

    def write(self, target: Path) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
            UsageError: It cannot be written.
        """
        try:
            with replacing(target) as stream:
                np.savez_compressed(stream, **self.arrays)
        except OSError as error:
            raise UsageError(
                f"the trace {target} cannot be written ({error.strerror}); name another"
            ) from error


def check_target(path: str | Path) -> Path:
    """Refuse a trace file that cannot be written, before any work is done.

    Raises:
        UsageError: It is a directory, lies in none, or in one that cannot be written to.
    """
    target = Path(path)
    try:
        if not target.name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        check_replaceable(target)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UsageError(
            f"the trace {str(path)!r} cannot be written ({reason}); name a file in a directory"
        ) from error
    return target
