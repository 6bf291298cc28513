"""The graphs of a bundle, run for a comparison: whole, or layer by layer where they are large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lrs_edge.bundle.parity import Mode
from lrs_edge.language.sequence import TokenSequence
from lrs_edge_export.checkpoints.model import Model
from lrs_edge_export.checkpoints.sequences import followed_by, table_of
from lrs_edge_export.checkpoints.tensors import Array
from lrs_edge_export.graphs.sessions import DecoderSession
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.parity import layers

#: Stages of more bytes are not loaded whole: engines need up to two copies of a stage's weights.
LARGE = 512 << 20

#: Places compared per image: greedy tokens, or tokens of the text below.
STEPS = 16

#: What follows the prompt where the LLM is compared layer by layer.
FORCED_TEXT = (
    "There are four ships in the image: two of them lie at the pier, the others are on the river "
    "in front of the harbour, near the bridge."
)

#: Embeddings float32 [n, D] of token ids int64 [n].
Embed = Callable[[NDArray[np.int64]], Array]


@dataclass(frozen=True)
class Text:
    """What a language model says after one prompt.

    Attributes:
        ids: The first STEPS - 1 tokens after the prompt.
        logits: float32 [STEPS, V], after the prompt and after each of them.
    """

    ids: NDArray[np.int64]
    logits: Array


@dataclass(frozen=True)
class Graphs:
    """Graph files of a bundle.

    Attributes:
        vision: Vision encoder with projector.
        rfm: Region Focus Module; None where there is none.
        llm: Language model.
        llm_kv: The language model with int8 key and value buffers, where it was written.
        rfm_weights: External data of the RFM, still open, for a comparison layer by layer; None
            to load the stage whole however large it is.
        llm_weights: Of the language model.
        embeddings: The bundle's embeddings, for the whole way; None takes the checkpoint's.
        tokenizer: The bundle's tokenizer; None takes the checkpoint's.
    """

    vision: Path
    rfm: Path | None
    llm: Path
    llm_kv: Path | None = None
    rfm_weights: WeightFile | None = None
    llm_weights: WeightFile | None = None
    embeddings: Path | None = None
    tokenizer: Path | None = None

    @property
    def rfm_mode(self) -> Mode:
        """How the RFM is run."""
        return _mode(self.rfm_weights)

    @property
    def llm_mode(self) -> Mode:
        """How the language model is run."""
        return _mode(self.llm_weights)

    def rfm_logits(self, model: Model, inputs: Sequence[TokenSequence]) -> list[Array]:
        """Logits [H, T] of the RFM for each input. Raises ExportError."""
        if self.rfm_weights is not None and self.rfm_mode != "whole":
            return layers.engine_scores(model.region_focus, self.rfm_weights, inputs)
        assert self.rfm is not None
        return layers.run_decoder(self.rfm, inputs)

    def texts(self, model: Model, prompts: Sequence[TokenSequence], embed: Embed) -> list[Text]:
        """What the language model says after each prompt.

        Whole, it chooses tokens greedily; layer by layer it is given FORCED_TEXT.

        Raises:
            ExportError: The engine does not take a graph.
        """
        if self.llm_weights is None or self.llm_mode == "whole":
            return chosen_texts(self.llm, prompts, embed)
        ids = _forced_ids(model)
        forced = [followed_by(prompt, embed(ids)) for prompt in prompts]
        found = layers.engine_logits(model, self.llm_weights, forced, STEPS)
        return [Text(ids, logits) for logits in found]


def chosen_texts(llm: Path, prompts: Sequence[TokenSequence], embed: Embed) -> list[Text]:
    """What a language model's graph chooses greedily after each prompt."""
    session = DecoderSession(llm, capacity=max(map(len, prompts)) + STEPS)
    texts = []
    for prompt in prompts:
        session.length = 0
        logits = [session.run(prompt.values, prompt.positions)[0]]
        ids: list[int] = []
        while len(logits) < STEPS:
            ids.append(int(logits[-1].argmax()))
            place = np.array([prompt.next_position + len(ids) - 1], np.int64)
            logits.append(session.run(embed(np.array(ids[-1:], np.int64)), place)[0])
        texts.append(Text(np.array(ids, np.int64), np.stack(logits)))
    return texts


def reference_logits(
    model: Model, prompts: Sequence[TokenSequence], texts: Sequence[Text]
) -> list[Array]:
    """Logits [STEPS, V] of PyTorch after each prompt and each token of the text after it."""
    # One pass over the engine's text gives the reference's choice at every step.
    table = table_of(model)
    inputs = [
        followed_by(prompt, table.lookup(text.ids))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    states = layers.reference_states(model.llm, inputs)
    return [layers.reference_logits(model, x[-STEPS:]) for x in states]


def size_of(graph: Path) -> int:
    """Bytes of a graph and its weights."""
    data = graph.with_name(f"{graph.name}.data")
    return sum(path.stat().st_size for path in (graph, data) if path.is_file())


def _mode(weights: WeightFile | None) -> Mode:
    large = weights is not None and weights.path.stat().st_size > LARGE
    return "layer by layer" if large else "whole"


def _forced_ids(model: Model) -> NDArray[np.int64]:
    """STEPS - 1 tokens: with the prompt's last place, the logits at STEPS places are compared."""
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    ids: list[int] = tokenizer.encode(FORCED_TEXT, add_special_tokens=False).ids
    # A tokenizer that knows long words only may make fewer tokens of the text.
    return np.array((ids * STEPS)[: STEPS - 1], np.int64)
