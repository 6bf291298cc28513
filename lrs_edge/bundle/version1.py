"""Manifests of version 1, read as those of today: the one place that knows the older layout.

A stage named its graphs in fields of its own (`graph`, `masked_graph`, `int8_kv_graph`). Fields
that came later could be absent, which meant what is filled in here. What was measured was one flat
dictionary (`llm_cosine`, `llm_cosine_limit`, `llm_precision`, `accuracy_total`).
The prompt was text around an image that was always laid out in rows.
"""

from __future__ import annotations

from typing import Any

from lrs_edge.bundle.manifest import ONNXRUNTIME, SCHEMA_VERSION, Flavour

#: What an absent field meant.
_MANIFEST = {
    "embeddings": "embeddings.safetensors",
    "tokenizer": "tokenizer.json",
    "exact_integers": False,
}
_VISION = {"precision": "fp32", "flops": 0}
_DECODER = {"precision": "fp32", "intermediate": 0, "floats": "float32"}

#: Stages that figures could be of.
_COMPARED = ("vision", "rfm", "llm", "llm-kv")

#: Fields that named a stage's graphs, and their flavours; `graph` was the one that always existed.
_VISION_GRAPHS = {"graph": Flavour.PLAIN}
_DECODER_GRAPHS = {
    "graph": Flavour.GQA,
    "masked_graph": Flavour.MASKED,
    "int8_kv_graph": Flavour.GQA_INT8_KV,
}


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 in today's layout.

    Nothing is checked: what is not of version 1 stays as it is, for the check of today's layout to
    refuse it by its name.

    Args:
        content: What the JSON file holds; not changed.
    """
    new = _MANIFEST | content | {"schema_version": SCHEMA_VERSION}
    new["vision"] = _stage(content.get("vision"), _VISION_GRAPHS, _VISION)
    for name in ("rfm", "llm"):
        # None would be no RFM, which came later; an empty stage is refused for what it lacks.
        stage = {} if content.get(name) is None else content[name]
        new[name] = _stage(stage, _DECODER_GRAPHS, _DECODER)
    new["prompt"] = _prompt(content.get("prompt"))
    new["parity"] = _parity(content.get("parity", {}))
    return new


def _parity(flat: Any) -> Any:
    """What was measured, by stage; milliseconds of choices are left out."""
    if not isinstance(flat, dict):
        return flat
    new: dict[str, Any] = {"kept_higher": {}, "choices": []}
    stages: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        stage, _, rest = name.partition("_")
        if stage == "choice" and rest.endswith("_cosine") and rest.count("_") == 2:
            chosen, precision, _ = rest.split("_")
            new["choices"].append({"stage": chosen, "precision": precision, "cosine": value})
        elif stage not in _COMPARED or not rest:
            continue
        elif rest == "kept_higher":
            new["kept_higher"][stage] = str(value).split()
        else:
            found = stages.setdefault(stage, {"stage": stage, "figures": []})
            if rest in ("precision", "bytes", "mode"):
                found[rest] = value
            elif not rest.endswith("_limit") and isinstance(value, float | int):
                limit = flat.get(f"{name}_limit")
                sign = "<=" if rest.endswith("error") else ">="
                figure = {"value": value, "sign": sign, "limit": limit}
                found["figures"].append({"measure": rest.replace("_", " "), **figure})
    new["stages"] = list(stages.values())
    new["images"] = flat.get("images", "unknown images" if stages else None)
    if "accuracy" in flat:
        names = ("dataset", "correct", "total", "failed", "matching", "baseline_correct")
        given = {name: flat[f"accuracy_{name}"] for name in names if f"accuracy_{name}" in flat}
        new["accuracy"] = given
    return new


def _stage(stage: Any, graphs: dict[str, str], defaults: dict[str, Any]) -> Any:
    if not isinstance(stage, dict):
        return stage
    new = defaults | {key: value for key, value in stage.items() if key not in graphs}
    new["graphs"] = [
        {"path": stage.get(key), "flavour": flavour, "engines": [ONNXRUNTIME]}
        for key, flavour in graphs.items()
        if key == "graph" or stage.get(key) is not None
    ]
    # The first versions quantized weights alone, and called it so.
    if new["precision"] == "int8":
        new["precision"] = "int8-weight"
    return new


def _prompt(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return prompt
    bos = prompt.get("bos_id")
    parts: list[dict[str, Any]] = [] if bos is None else [{"part": "ids", "ids": [bos]}]
    parts += [
        {"part": "text", "text": prompt.get("prefix")},
        {"part": "global_view"},
        {"part": "separator", "ids": [prompt.get("separator_id")]},
        {"part": "local_rows"},
        {
            "part": "question",
            "text": prompt.get("suffix"),
            "newline": prompt.get("question_newline", False),
        },
    ]
    kept = {name: prompt[name] for name in ("stop_ids", "stop_texts") if name in prompt}
    return {"parts": parts, **kept}
