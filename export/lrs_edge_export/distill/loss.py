"""What the student is pulled towards: the teacher's attention, and the evidence if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Keeps logarithms finite where attention underflows.
_TINY = 1e-12


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts; 0 leaves a part out.

    Attributes:
        kl: Of the Kullback-Leibler divergence, teacher to student, in nats.
        mse: Of the squared differences, summed over the tokens.
        evidence: Of minus the logarithm of the score on evidence tokens, at the scoring layer.
    """

    kl: float = 1.0
    mse: float = 1.0
    evidence: float = 0.0


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) [Q] in nats of distributions [Q, n]."""
    logs = teacher.clamp_min(_TINY).log() - student.clamp_min(_TINY).log()
    return (teacher * logs).sum(dim=-1)


def distillation_loss(
    teacher: Tensor, student: Sequence[Tensor], evidence: Tensor, weights: LossWeights
) -> Tensor:
    """Mean over questions and layers.

    The mean squared error is multiplied by the number of tokens: scores sum to 1, so that their
    mean square would vanish with the size of the level.

    Args:
        teacher: float32 [N, Q, n], the listed layers' scores.
        student: N tensors [Q, n].
        evidence: bool [Q, n].
        weights: Of the parts.
    """
    parts = []
    for target, scores in zip(teacher, student, strict=True):
        squares = (target - scores).square().sum(dim=-1)
        parts.append(weights.kl * divergence(target, scores) + weights.mse * squares)
    loss = torch.stack(parts).mean()
    seen = evidence.any(dim=-1)
    if weights.evidence > 0 and bool(seen.any()):
        mass = (student[-1][seen] * evidence[seen]).sum(dim=-1)
        # Questions without evidence in view count too, so that groups weigh by their questions.
        loss = loss - weights.evidence * mass.clamp_min(_TINY).log().sum() / len(seen)
    return loss
