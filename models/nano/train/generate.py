"""Answer questions as the runtime will: RFM scores, top share of local tokens, greedy decoding."""

from __future__ import annotations

import numpy as np
import torch
from common import KEEP, TOKENS
from model import LanguageModel, Nano, rope, rotate
from sequences import View, Writer
from torch import Tensor
from torch.nn import functional
from warmup import decode


class Runner:
    """A trained model with its tokenizer; one sequence at a time, float32."""

    def __init__(self, model: Nano, writer: Writer, rfm: LanguageModel) -> None:
        self.model, self.writer, self.rfm = model.eval(), writer, rfm.eval()
        self.rfm_layers = len(rfm.layers) - 1

    def _words(self, ids: list[int]) -> Tensor:
        return self.model.llm.embed_tokens(torch.tensor(ids))

    def _project(self, view: View) -> tuple[Tensor, Tensor]:
        """Global tokens, and local tokens [rows, columns + 1, hidden] with their newlines."""
        features = torch.from_numpy(np.array(view.features))
        features = decode(features) if features.dtype == torch.uint8 else features
        tokens = self.model.projector(features)
        local = tokens[torch.from_numpy(view.local)]
        newline = self.model.image_newline.expand(len(local), 1, -1)
        return tokens[:TOKENS], torch.cat((local, newline), 1)

    def _sequence(self, whole: Tensor, local: Tensor, question: str) -> Tensor:
        parts = [self._words(self.writer.before), whole, self._words(self.writer.separator)]
        return torch.cat([*parts, local, self._words(self.writer.after(question))])

    @torch.inference_mode()
    def scores(self, view: View, question: str, layer: int | None = None) -> np.ndarray:
        """RFM score of every local token and newline, [rows, columns + 1].

        With a layer, the language model's own attention at that layer instead.
        """
        llm = self.rfm if layer is None else self.model.llm
        layer = self.rfm_layers if layer is None else layer
        whole, local = self._project(view)
        flat = local.reshape(-1, local.shape[-1])
        x = self._sequence(whole, flat, question)[None]
        positions = torch.arange(x.shape[1])[None]
        state = llm.states(x, positions, layers=layer)[-1]
        last = torch.tensor([[x.shape[1] - 1]])
        logits = llm.attention_logits(state, layer, positions, last)[0, :, 0]
        start = len(self.writer.before) + TOKENS + 1
        weights = logits[:, start : start + len(flat)].softmax(-1).mean(0)
        return weights.view(local.shape[:2]).numpy()

    @staticmethod
    def keep(scores: np.ndarray, share: float = KEEP) -> np.ndarray:
        """Places kept: the best share of all local places, and every newline."""
        count = int(share * scores.size)
        kept = np.zeros(scores.size, bool)
        if count:
            kept[np.argpartition(-scores.ravel(), count - 1)[:count]] = True
        kept = kept.reshape(scores.shape)
        kept[:, -1] = True
        return kept

    @torch.inference_mode()
    def answer(self, view: View, question: str, most: int = 48) -> str:
        """The greedy answer."""
        kept = torch.from_numpy(self.keep(self.scores(view, question)))
        whole, local = self._project(view)
        x = self._sequence(whole, local[kept], question)
        return self.writer.tokenizer.decode(self.greedy(x, most), skip_special_tokens=True)

    def greedy(self, x: Tensor, most: int) -> list[int]:
        """Prefill and decode with cached keys and values."""
        llm = self.model.llm
        cache: list[tuple[Tensor, Tensor]] = []
        found: list[int] = []
        offset = 0
        x = x[None]
        while len(found) < most:
            positions = torch.arange(offset, offset + x.shape[1])[None]
            cos, sin = rope(positions, llm.config)
            for i, layer in enumerate(llm.layers):
                attention = layer.self_attn
                normed = layer.input_layernorm(x)
                t = normed.shape[1]
                q = attention.q_proj(normed).view(1, t, attention.heads, -1).transpose(1, 2)
                k = attention.k_proj(normed).view(1, t, attention.kv_heads, -1).transpose(1, 2)
                v = attention.v_proj(normed).view(1, t, attention.kv_heads, -1).transpose(1, 2)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                if offset:
                    k, v = torch.cat((cache[i][0], k), 2), torch.cat((cache[i][1], v), 2)
                    cache[i] = (k, v)
                else:
                    cache.append((k, v))
                mixed = functional.scaled_dot_product_attention(
                    q, k, v, is_causal=not offset, enable_gqa=True
                )
                x = x + attention.o_proj(mixed.transpose(1, 2).reshape(1, t, -1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            offset += x.shape[1]
            token = int(llm.logits(llm.norm(x[0, -1])).argmax())
            if token in (self.writer.end[0], 0):
                break
            found.append(token)
            x = self._words([token])[None]
        return found
