"""A bundle of the embedded model's family, turned back into a checkpoint of float32 weights.

So a benchmark that needs the same weights in PyTorch and in several precisions can be run by
whoever has the repository: integers are multiplied by their scales, and both sides start from the
result.

    python -m benchmarks.embedded_checkpoint TARGET [--bundle DIR]
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from benchmarks.measure import parser_for
from lrs_edge.bundle.bundle import Bundle, open_bundle
from lrs_edge.bundle.layout import Objects, Question, Separator, Text
from lrs_edge.bundle.manifest import (
    EMBED_TOKENS,
    IMAGE_NEWLINE,
    POSITION_COLS,
    POSITION_ROWS,
    DecoderSpec,
    Flavour,
    Manifest,
    ObjectSpec,
    StageSpec,
)
from lrs_edge.errors import BundleError
from lrs_edge_export.checkpoints.vision import EfficientNetTower

Array = NDArray[np.float32]

#: `name.int8` with `name.scale`, and the like (`lrs_edge/export`); float16 has a suffix too.
_INTEGERS = re.compile(r"(?P<name>.+\.weight)\.int(8|4)")
_SCALES = ("scale", "scale8", "scale4")

_NECK, _OBJECTS = "model.vision_neck.", "model.vision_objects."

#: What onnxruntime's static quantization makes of a weight or a bias, and the names of its scales.
_STATIC = re.compile(r"(?P<name>.+\.(weight|bias))_quantized")


def write_checkpoint(bundle: Path | None, folder: Path) -> Path:
    """Write a checkpoint folder that `lrs-edge export` reads.

    Args:
        bundle: Bundle of family `nano`; None for the embedded model.
        folder: The folder; it is created.

    Returns:
        The folder.

    Raises:
        BundleError: The bundle is of another family, or is not as its manifest says.
    """
    source = open_bundle(bundle)
    if source.manifest.family != "nano":
        raise BundleError(
            f"{bundle} is of the family {source.manifest.family}; name the checkpoint it was "
            "exported from with --checkpoint instead"
        )
    stages = ("vision", "rfm", "llm") if _has_own_rfm(source.manifest) else ("vision", "llm")
    graphs = {name: _Graph(source, name) for name in stages}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(source, graphs)
    save_file(tensors, folder / "model.safetensors")
    config = _config(source.manifest, graphs["llm"], source.file(source.manifest.tokenizer))
    config |= _rfm_config(source.manifest) | _neck_config(tensors)
    config |= _objects_config(source.manifest.vision.objects, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    penalty = {"repetition_penalty": source.manifest.repetition_penalty}
    (folder / "generation_config.json").write_text(json.dumps(penalty))
    tokenizer = source.file(source.manifest.tokenizer)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


def _has_own_rfm(manifest: Manifest) -> bool:
    """Whether the region focus module has weights; it may read the language model's instead."""
    rfm = manifest.rfm
    return rfm is not None and f"{rfm.path(Flavour.GQA)}.data" in manifest.files


def _rfm_config(manifest: Manifest) -> dict[str, Any]:
    if manifest.rfm is None:
        return {}
    if _has_own_rfm(manifest):
        return {"llm_layer_list": list(range(1, manifest.rfm.layers + 1))}
    return {"rfm_from_llm": manifest.rfm.layers}


def _neck_config(tensors: dict[str, Array]) -> dict[str, Any]:
    parts = {"width": "high", "low": "low", "words": "words"}
    kernels = {key: tensors.get(f"{_NECK}{name}.weight") for key, name in parts.items()}
    found = {key: len(kernel) for key, kernel in kernels.items() if kernel is not None}
    return {"vision_neck": found} if found else {}


def _objects_config(spec: ObjectSpec | None, tensors: dict[str, Array]) -> dict[str, Any]:
    if spec is None:
        return {}
    return {
        "vision_objects": {
            "width": len(tensors[f"{_OBJECTS}fine.weight"]),
            "labels": list(spec.labels),
            "thresholds": [list(pair) for pair in spec.thresholds],
            **({"aliases": [list(words) for words in spec.aliases]} if spec.aliases else {}),
        }
    }


class _Graph:
    """One stage's graph with its weights as float32."""

    def __init__(self, bundle: Bundle, stage: str) -> None:
        spec: StageSpec = getattr(bundle.manifest, stage)
        name = spec.path(Flavour.PLAIN if stage == "vision" else Flavour.GQA)
        model = onnx.load(str(bundle.file(name)))
        self.nodes = list(model.graph.node)
        self._raw = {tensor.name: tensor for tensor in model.graph.initializer}

    def weights(self) -> Iterator[tuple[str, Array]]:
        """Names and values of what the checkpoint called `.weight` or `.bias`."""
        for name in self._raw:
            match = _INTEGERS.fullmatch(name)
            if match:
                yield match["name"], self._dequantized(match["name"], self._floats(name))
            elif static := _STATIC.fullmatch(name):
                yield static["name"], self._static(static["name"], self._floats(name))
            elif name.removesuffix(".fp16").endswith((".weight", ".bias")):
                yield name.removesuffix(".fp16"), self._floats(name)

    def floats(self, name: str) -> Array:
        """One float tensor."""
        return self._floats(name if name in self._raw else f"{name}.fp16")

    def _floats(self, name: str) -> Array:
        return numpy_helper.to_array(self._raw[name]).astype(np.float32)

    def _static(self, name: str, integers: Array) -> Array:
        # What is added to a product is quantized as activations are, about a zero point.
        scale, zero = (
            self._floats(next(key for key in keys if key in self._raw))
            for keys in (
                [f"{name}{between}{part}" for between in ("", "_quantized")]
                for part in ("_scale", "_zero_point")
            )
        )
        return _by_channel(integers - zero.ravel()[0], scale)

    def _dequantized(self, name: str, integers: Array) -> Array:
        found = next(key for key in (f"{name}.{part}" for part in _SCALES) if key in self._raw)
        scale = self._floats(found)
        if scale.ndim == 1:
            return _by_channel(integers, scale)
        block = -(-len(integers) // len(scale))
        # Blocks have a power of two inputs; the last may be shorter.
        block = 1 << (block - 1).bit_length()
        return integers * np.repeat(scale, block, axis=0)[: len(integers)]


def _by_channel(integers: Array, scale: Array) -> Array:
    """Per output channel: the columns of a transposed matrix, the rows of a kernel or a bias."""
    shape = (1, -1) if integers.ndim == 2 else (-1,) + (1,) * (integers.ndim - 1)
    return integers * scale.reshape(shape)


def _tensors(bundle: Bundle, graphs: dict[str, _Graph]) -> dict[str, Array]:
    manifest = bundle.manifest
    table = load_file(bundle.file(manifest.embeddings))
    found: dict[str, Any] = {
        "model.embed_tokens.weight": table[EMBED_TOKENS],
        "model.image_newline": table[IMAGE_NEWLINE],
    }
    if manifest.vision.positions:
        found["model.vision_position.rows"] = table[POSITION_ROWS]
        found["model.vision_position.cols"] = table[POSITION_COLS]
    for name, value in graphs["vision"].weights():
        found |= _vision_tensors(name, value)
    for stage, prefix in (("rfm", "model.mm_projector.token_pruner."), ("llm", "model.")):
        if stage not in graphs:
            continue
        spec: DecoderSpec = getattr(manifest, stage)
        for name, value in graphs[stage].weights():
            for part, rows in _unpacked(name, value.T if value.ndim == 2 else value, spec):
                found[part if part == "lm_head.weight" else prefix + part] = rows
    return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in found.items()}


def _vision_tensors(name: str, value: Array) -> dict[str, Array]:
    """What one weight of the vision graph was in the checkpoint."""
    if name == "projector.neck.weight":
        return {"model.mm_projector.neck.weight": value.T}
    if name.startswith("projector."):
        layer = name.removeprefix("projector.")
        return {f"model.mm_projector.mlp_projector.{layer}": value.T}
    if name.startswith("neck."):
        return {_NECK + name.removeprefix("neck."): value}
    if name.startswith("objects."):
        return {_OBJECTS + name.removeprefix("objects."): value}
    if name.endswith(".weight"):
        return {f"model.vision_tower.{name}": value}
    norm = _norm_behind(name.removesuffix(".bias"))
    return _identity_norm(f"model.vision_tower.{norm}", value)


def _unpacked(name: str, value: Array, spec: DecoderSpec) -> Iterator[tuple[str, Array]]:
    """A weight, or query, key and value out of one [(heads + 2 kv_heads) * d, ...]."""
    if ".qkv_proj." not in name:
        yield name, value
        return
    sizes = {"q_proj": spec.heads, "k_proj": spec.kv_heads, "v_proj": spec.kv_heads}
    start = 0
    for part, heads in sizes.items():
        end = start + heads * spec.head_dim
        yield name.replace("qkv_proj", part), value[start:end]
        start = end


def _norm_behind(convolution: str) -> str:
    """The batch norm that export folded into a convolution of efficientnet-lite0."""
    block, _, layer = convolution.rpartition(".")
    if not block:
        return {"_conv_stem": "_bn0", "_conv_head": "_bn1"}[layer]
    places = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    return f"{block}.{places[layer]}"


def _identity_norm(name: str, bias: Array) -> dict[str, Array]:
    """A batch norm that only adds a bias."""
    ones = np.ones_like(bias)
    return {
        f"{name}.weight": ones,
        f"{name}.bias": bias,
        f"{name}.running_mean": np.zeros_like(bias),
        f"{name}.running_var": ones - np.float32(EfficientNetTower.eps),
    }


def _config(manifest: Manifest, llm: _Graph, tokenizer: Path) -> dict[str, Any]:
    spec, vision = manifest.llm, manifest.vision
    last = float(llm.floats("inverse_frequencies").ravel()[-1])
    theta = last ** (-spec.head_dim / (spec.head_dim - 2))
    norm = next(node for node in llm.nodes if node.op_type == "RMSNormalization")
    eps = next(part.f for part in norm.attribute if part.name == "epsilon")
    vocabulary = json.loads(tokenizer.read_text())
    names = {token["id"]: token["content"] for token in vocabulary["added_tokens"]}
    names |= {place: name for name, place in vocabulary["model"]["vocab"].items()}
    # What was seen is said in one way by all checkpoints that have a head for it.
    parts = [part for part in manifest.prompt.parts if not isinstance(part, Objects)]
    text, _, separator, _, question = parts
    if not (
        isinstance(text, Text)
        and isinstance(separator, Separator)
        and isinstance(question, Question)
    ):
        raise ValueError("the bundle's prompt is not laid out as that of the embedded model")
    return {
        "architectures": ["LrsEdgeNanoForCausalLM"],
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        # Both were written as float32; the checkpoint had them in decimal.
        "rms_norm_eps": float(f"{eps:.6g}"),
        "rope_theta": float(f"{theta:.6g}"),
        "vocab_size": spec.vocabulary,
        "tie_word_embeddings": False,
        "eos_token_id": list(manifest.prompt.stop_ids),
        "slice_block_size": vision.tile,
        "base_side": manifest.search.base_side,
        "local_pool": vision.local_pool,
        "token_grid": vision.grid,
        "position_entries": vision.positions,
        "mm_vision_tower": "efficientnet-lite0",
        "image_mean": vision.mean,
        "image_std": vision.std,
        "prompt_prefix": text.text,
        "prompt_suffix": question.text,
        "separator": names[separator.ids[0]],
        "tokenizer_model_max_length": manifest.limits.max_length,
    }


def main() -> None:
    """Write the checkpoint."""
    parser = parser_for(__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bundle", type=Path, help="default: the embedded model")
    options = parser.parse_args()
    print(write_checkpoint(options.bundle, options.target))


if __name__ == "__main__":
    main()
