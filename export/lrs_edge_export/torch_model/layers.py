"""Linear layers and activation functions in PyTorch, of weights that are read as they are used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from lrs_edge_export.checkpoints.tensors import Scoped
from lrs_edge_export.torch_model.decoder import Observer


def activation(name: str, x: Tensor) -> Tensor:
    """An activation function, by the names that towers and projectors have for them."""
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name in ("silu", "relu"):
        return F.silu(x) if name == "silu" else F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def linear(tensors: Scoped, name: str, x: Tensor, observe: Observer | None = None) -> Tensor:
    """A linear layer with the bias that it has, if any; its input is observed under its name."""
    if observe is not None:
        observe(name, x)
    bias = read(tensors, f"{name}.bias") if tensors.has(f"{name}.bias") else None
    return F.linear(x, read(tensors, f"{name}.weight"), bias)


def read(tensors: Scoped, name: str) -> Tensor:
    """One tensor."""
    return torch.from_numpy(tensors.read(name))
