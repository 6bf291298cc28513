"""onnxruntime-genai over the graphs of its own model builder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


class GenaiEngine:
    """A worker's engine.

    Args:
        folder: What the model builder wrote.
        threads: Threads of one operation.
        places: Tokens that the cache must hold.
    """

    def __init__(self, folder: Path, threads: int, places: int) -> None:
        config = og.Config(str(folder))
        session = {"intra_op_num_threads": threads}
        # Every run must have the same length: the last token of the vocabulary, which no prompt of
        # this benchmark leads to, is the one that ends an answer.
        vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
        changes = {"decoder": {"session_options": session}, "eos_token_id": vocabulary - 1}
        config.overlay(json.dumps({"model": changes}))
        self._model = og.Model(config)
        self._places = places
        self._generator: og.Generator | None = None

    def start(self) -> None:
        """Begin a conversation; its cache is allocated here."""
        # The old cache goes before the new one comes.
        self._generator = None
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._places, do_sample=False)
        self._generator = og.Generator(self._model, params)

    def prefill(self, ids: list[int]) -> None:
        """Run a prompt through the model."""
        self._running.append_tokens(np.array([ids], np.int32))

    def decode(self, steps: int) -> list[int]:
        """Decode greedily.

        Raises:
            RuntimeError: The answer ended early.
        """
        chosen: list[int] = []
        for _ in range(steps + 1):
            if chosen and self._running.is_done():
                raise RuntimeError(f"genai ended the answer after {len(chosen)} tokens")
            self._running.generate_next_token()
            chosen.append(int(self._running.get_next_tokens()[0]))
        return chosen

    @property
    def _running(self) -> og.Generator:
        if self._generator is None:
            raise RuntimeError("start comes first")
        return self._generator


def load(path: Path, threads: int, places: int) -> GenaiEngine:
    """Load the engine."""
    return GenaiEngine(path, threads, places)


def version() -> str:
    """Of the package."""
    return f"onnxruntime-genai {og.__version__}"
