"""Where every node of a session really runs: counted, and compared with where it may run.

ONNX Runtime gives a node that a provider has no kernel for to the CPU, and says nothing. Besides
being slow, that can be wrong: a node on the CPU reads what was bound on the device from a copy that
is made once, when it is bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lrs_edge.engines.base import HostNodes
from lrs_edge.engines.providers import Provider, cuda_problem
from lrs_edge.engines.runtime import ort
from lrs_edge.errors import BackendError

#: Has a session remember where its nodes went.
RECORD = "session.record_ep_graph_assignment_info"

#: What is left where a provider's driver and libraries are there and it does not load.
NO_CARD = "its libraries are there: no card, or a driver that is too old?"

#: Operators with which graphs compute shapes and places; asked for nodes that are not in the file.
_SHAPE_OPERATORS = frozenset(
    (
        *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather"),
        *("Identity", "Max", "Min", "Mul", "Pad", "Range", "ReduceMax", "Reshape", "Shape"),
        *("Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    )
)


def node_places(session: ort.InferenceSession) -> dict[str, int]:
    """Nodes by the provider that runs them; empty where onnxruntime does not tell (before 1.24)."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def check_places(
    session: ort.InferenceSession, file: str, provider: Provider, host: HostNodes | None
) -> None:
    """Refuse a session that runs elsewhere, in part or as a whole, than it was told to.

    Args:
        session: Loaded with `RECORD`.
        file: The graph's, for messages.
        provider: What it was told to run on.
        host: What may run on the CPU; None where the file is not known.

    Raises:
        BackendError: The provider does not load, or has no kernels for operators of the graph.
    """
    if provider.name not in session.get_providers():
        problem = cuda_problem() if provider.memory == "cuda" else ""
        raise BackendError(
            f"{provider.name} is installed but does not load "
            f"({problem or NO_CARD}); see `lrs-edge doctor`, or use "
            "--device cpu"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    elsewhere: Mapping[str, int] = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name not in provider.own
        for node in part.get_nodes()
        if not _may(node, host or HostNodes())
    )
    if elsewhere:
        raise BackendError(_refusal(file, provider, elsewhere))


def _may(node: Any, host: HostNodes) -> bool:
    """Whether a node may run on the CPU; one that the optimizer made, by its operator."""
    made = node.name not in host.others
    return node.name in host.may or (made and node.op_type in _SHAPE_OPERATORS)


def _refusal(file: str, provider: Provider, operators: Mapping[str, int]) -> str:
    """What to say of a graph that would run on the CPU in part."""
    # What matters most comes first: what computes, and most of it.
    order = sorted(operators, key=lambda name: (name in _SHAPE_OPERATORS, -operators[name], name))
    shown = ", ".join(f"{operators[name]} {name}" for name in order[:6])
    return (
        f"{file} would run on the CPU in part ({shown}), for which "
        f"{provider.name} has no kernels; use --device cpu for its stage, or export the checkpoint "
        "for CUDA: lrs-edge export CHECKPOINT --target cuda -o BUNDLE"
    )
