"""The training loop: steps over groups, its state on disk, and the same result after a break."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrs_edge.errors import UsageError
from lrs_edge_export.distill.chance import seeded
from lrs_edge_export.distill.collect import OnProgress, Targets
from lrs_edge_export.distill.loss import LossWeights, distillation_loss
from lrs_edge_export.distill.sequences import Assembler, QuestionGroup
from lrs_edge_export.distill.student import Student

_WARMUP_STEPS = 20
_CLIP_NORM = 1.0
#: The rate never falls below this share of the highest.
_FLOOR = 0.02
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
#: The loss that is told is a running mean over about so many steps.
_MEMORY = 20
_TELL_EVERY = 20


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast the student learns.

    Attributes:
        steps: Steps until it ends; None for no limit.
        minutes: Minutes of training until it ends; None for no limit.
        batch: Groups whose gradients are summed in one step.
        rate: Highest learning rate of AdamW.
        weights: Of the loss.
        seed: Of the order of groups.
        save_every: Seconds between states on disk.
    """

    steps: int | None = 1000
    minutes: float | None = None
    batch: int = 2
    rate: float = 2e-4
    weights: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    save_every: float = 120.0


class Trainer:
    """One run of the training, which may be broken off and go on later.

    With a limit in steps the result is the same as without a break.

    Args:
        student: Is changed in place.
        groups: To learn from.
        assembler: Makes their sequences.
        targets: What the teacher sees in them.
        options: How.
        state: The file that the state is kept in.

    Raises:
        UsageError: The state on disk is damaged or of another student.
    """

    def __init__(
        self,
        student: Student,
        groups: Sequence[QuestionGroup],
        assembler: Assembler,
        targets: Targets,
        options: TrainOptions,
        state: Path,
    ) -> None:
        self._student = student
        self._groups = groups
        self._assembler = assembler
        self._targets = targets
        self._options = options
        self._state = state
        self._parameters = student.parameters()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._parameters, options.rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY
        )
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        if state.is_file():
            self._restore()

    def run(self, progress: OnProgress, now: Callable[[], float] = time.monotonic) -> None:
        """Train until the limit in steps or minutes.

        Args:
            progress: Told the loss now and then.
            now: Clock in seconds.

        Raises:
            ImageError: An image cannot be read.
        """
        saved = self.seconds
        while self._progress() < 1.0:
            begun = now()
            self._one_step()
            self.seconds += now() - begun
            if self.step % _TELL_EVERY == 0 or self._progress() >= 1.0:
                progress(f"step {self.step}: loss {self.loss:.4f}, {self.seconds:.0f} s")
            if self.seconds - saved >= self._options.save_every:
                self._save()
                saved = self.seconds
        self._save()
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def _progress(self) -> float:
        """Share of the training that is done."""
        options = self._options
        shares = [0.0]
        if options.steps is not None:
            shares.append(self.step / options.steps if options.steps else 1.0)
        if options.minutes is not None:
            shares.append(self.seconds / (60 * options.minutes) if options.minutes else 1.0)
        return max(shares)

    def _one_step(self) -> None:
        self._set_rate()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for place in range(self._options.batch):
            group = self._drawn(self.step * self._options.batch + place)
            loss = self._loss_of(group) / self._options.batch
            torch.autograd.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM)
        self._optimizer.step()
        self.step += 1
        share = 1 / min(self.step, _MEMORY)
        self.loss = total if math.isnan(self.loss) else (1 - share) * self.loss + share * total

    def _set_rate(self) -> None:
        cosine = 0.5 * (1 + math.cos(math.pi * min(self._progress(), 1.0)))
        warm = min((self.step + 1) / _WARMUP_STEPS, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.rate * warm * (_FLOOR + (1 - _FLOOR) * cosine)

    def _drawn(self, count: int) -> QuestionGroup:
        """The group at a place of an endless sequence: every epoch in an order of its own."""
        epoch, place = divmod(count, len(self._groups))
        order = seeded(self._options.seed, epoch).permutation(len(self._groups))
        return self._groups[int(order[place])]

    def _loss_of(self, group: QuestionGroup) -> Tensor:
        made, device = self._assembler.build(group), self._student.device
        target = torch.from_numpy(self._targets.get(group)).to(device)
        evidence = torch.from_numpy(made.evidence).to(device)
        scores = self._student.scores(made.packed)
        return distillation_loss(target, scores, evidence, self._options.weights)

    def _save(self) -> None:
        state = {
            "student": self._student.state(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        part = self._state.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._state)

    def _restore(self) -> None:
        try:
            state: dict[str, Any] = torch.load(
                self._state, map_location=self._student.device, weights_only=True
            )
            self._student.load(state["student"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.loss = float(state["loss"])
        # torch.load raises whatever the damaged or hostile file provokes.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{self._state} is not the state of this training ({reason}); remove it to start "
                "the training again"
            ) from error
