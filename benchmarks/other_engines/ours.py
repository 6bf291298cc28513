"""The LLM stage of lrs-edge: `LanguageModel` over an exported graph, as `lrs-edge ask` runs it.

Looking up embeddings, growing the cache and turning tokens into text are in the times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lrs_edge.bundle.bundle import Embeddings
from lrs_edge.bundle.layout import PromptSpec, rows_layout
from lrs_edge.bundle.manifest import DecoderSpec, Flavour, GraphFile
from lrs_edge.engines.base import BackendOptions
from lrs_edge.engines.onnx import OnnxGraph
from lrs_edge.engines.runtime import ort
from lrs_edge.language.decoder import Decoder
from lrs_edge.language.kv_cache import KVCache, TokenKind, make_tokens
from lrs_edge.language.llm import LanguageModel
from lrs_edge.language.prompt import Prompt
from lrs_edge.language.sampling import Sampler


class OurEngine:
    """A worker's engine over the runtime's objects.

    Args:
        folder: Of `weights.write_ours`, in a folder beside the checkpoint `hf`.
        threads: Threads of one operation.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        checkpoint = folder.parent.parent / "hf"
        config = json.loads((checkpoint / "config.json").read_text())
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        graph = OnnxGraph.load(folder / "llm.onnx", BackendOptions(provider="cpu", threads=threads))
        spec = DecoderSpec(
            graphs=(GraphFile("llm.onnx", Flavour.GQA),),
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            precision="",
            floats="float32",
            vocabulary=vocabulary,
        )
        # Stop tokens are for the prompt's checks; the model below has none, so that it never stops.
        layout = rows_layout("", "{question}", separator_id=0)
        template = PromptSpec(layout, (config["eos_token_id"],))
        self._embeddings = Embeddings(folder / "embeddings.safetensors", hidden, vocabulary)
        self._model = LanguageModel(
            Decoder(graph, spec, scoring=False),
            Prompt(checkpoint / "tokenizer.json", template, vocabulary),
            self._embeddings,
            stop_ids=(),
        )
        self._cache: KVCache = self._model.new_cache()
        self._logits = np.zeros(0, np.float32)

    def start(self) -> None:
        """Begin with an empty cache without room, as a first question does."""
        self._cache = self._model.new_cache()

    def prefill(self, ids: list[int]) -> None:
        """Run a prompt through the model."""
        embeds = self._embeddings.lookup(np.array(ids, np.int64))
        tokens = make_tokens(np.arange(len(ids), dtype=np.int64), TokenKind.QUESTION)
        self._logits = self._model.prefill(self._cache, embeds, tokens, 0)

    def decode(self, steps: int) -> list[int]:
        """Decode greedily."""
        return list(self._generate(steps + 1))

    def _generate(self, count: int) -> Iterator[int]:
        sampler = Sampler(temperature=0.0, top_p=1.0, seed=0)
        for step in self._model.generate(
            self._cache, self._logits, sampler, max_tokens=count, expired=lambda: False
        ):
            if step.token is not None:
                yield step.token


def load(path: Path, threads: int, places: int) -> OurEngine:
    """Load the engine; buffers grow by themselves, so `places` is not needed."""
    del places
    return OurEngine(path, threads)


def version() -> str:
    """Of the engine underneath."""
    return f"lrs-edge on onnxruntime {ort.__version__}"
