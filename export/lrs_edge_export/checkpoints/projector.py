"""The projector: from a tower's features to tokens of the language model's width."""

from __future__ import annotations

from dataclasses import dataclass

from lrs_edge_export.checkpoints.tensors import Scoped, Shapes


@dataclass(frozen=True)
class Projector:
    """Pixel shuffle, layer norm and linear layers, of which every family has some.

    A shuffle by s joins the s x s features of every square of the grid into one feature, row after
    row, so that a tile has s * s times fewer tokens that are as much wider.

    Attributes:
        tensors: Source scoped to the projector.
        linears: Names of the linear layers, one or two.
        activation: Between two of them: `gelu` (erf), `gelu_tanh`, `silu` or `relu`.
        bias: Whether linear layers have a bias.
        shuffle: The factor s; 1 joins nothing.
        norm: Name of the layer norm before the linear layers; empty for none.
        eps: Of that norm.
        inner: Width between two linear layers; 0 where it is that of the tokens.
        name: Of the projector in graphs and plans, `projector` or `projector.` and more.
    """

    tensors: Scoped
    linears: tuple[str, ...] = ("0", "2")
    activation: str = "gelu"
    bias: bool = True
    shuffle: int = 1
    norm: str = ""
    eps: float = 1e-5
    inner: int = 0
    name: str = "projector"

    def label(self, number: int) -> str:
        """Name of a linear layer in graphs and plans: `projector.0`, `projector.2`."""
        return f"{self.name}.{2 * number}"

    def check(self, width: int, hidden: int) -> None:
        """Check all tensors against the config.

        Args:
            width: Of the tower's features.
            hidden: Of the tokens.

        Raises:
            ExportError: Tensors are missing or of other shapes, or there are more.
        """
        inner = width * self.shuffle**2
        shapes: Shapes = {}
        if self.norm:
            shapes = {f"{self.norm}.{part}": (inner,) for part in ("weight", "bias")}
        for name in self.linears:
            outer = hidden if name == self.linears[-1] else self.inner or hidden
            shapes[f"{name}.weight"] = (outer, inner)
            if self.bias:
                shapes[f"{name}.bias"] = (outer,)
            inner = outer
        self.tensors.require(shapes, "projector")
        self.tensors.refuse_others("", set(shapes), "projector")
