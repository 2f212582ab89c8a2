"""Steps that are left out because their features, loss or gradient are not finite (`runtime.skip_nonfinite`).

All ranks find it at the same place of the step, before the optimizer whose update it would have spoilt has moved anything. What
the step had changed by then is undone as far as it is state: gradients are dropped, and all buffers (running statistics of batch
norms, counters) are as before the step. A method that steps several optimizers in a step keeps the updates that came
before; the mining servers keep the finite embeddings that they were sent. The step counter moves on, and with it the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from methods.optim import Optimizer
from pipeline.data.store import Samples
from pipeline.errors import DivergedError, NonFiniteError
from pipeline.runs.checkpoint import TrainingState

MOST_NAMED = 8  # images that a message names


class StepUndo:
    """Takes back what a step has done to buffers and gradients; a copy of all buffers a step, 0.6 ms for a ResNet-50.

    Args:
        modules: The modules that a step changes.
        optimizers: Their optimizers.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizers: Mapping[str, Optimizer]) -> None:
        self.modules = list(modules)
        self.optimizers = optimizers
        self._kept: list[dict[str, Tensor]] = []

    def begin_step(self) -> None:
        self._kept = [{name: buffer.detach().clone() for name, buffer in m.named_buffers()} for m in self.modules]

    @torch.no_grad()
    def undo(self) -> None:
        for module, kept in zip(self.modules, self._kept, strict=True):
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])  # in place: DDP refers to it
        for optimizer in self.optimizers.values():
            optimizer.inner.zero_grad(set_to_none=True)


def count_skipped(error: NonFiniteError, progress: TrainingState, most_in_a_row: int) -> str | None:
    """Counts a step that was left out; returns what is to be told of it, for the first ones and then ever fewer.

    Raises:
        NonFiniteError: Nothing may be left out.
        DivergedError: As many steps as may be left out in a row were.
    """
    if most_in_a_row == 0:
        raise error
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    if progress.skipped_in_a_row > most_in_a_row:
        raise DivergedError(
            f"{error}. The {most_in_a_row} steps before it were left out for the same reason (runtime.skip_nonfinite is "
            f"{most_in_a_row})"
        ) from error
    count = progress.skipped_steps
    return f"left out, number {count:,}: {error}" if count & (count - 1) == 0 else None


def name_samples(samples: Samples, rows: Int64[np.ndarray, " slots"], bad: Bool[np.ndarray, " slots"] | None) -> str:
    """The images of a step with their classes: those whose features are not finite, or else the first ones.

    Args:
        samples: The training set.
        rows: Position of each slot's image in it.
        bad: Slots whose features are not finite, where the trunk has got to them.
    """
    found = rows[bad] if bad is not None and bad.any() else rows
    named = (f"{samples.ids[row]} ({samples.class_names[samples.labels[row]]})" for row in found[:MOST_NAMED])
    more = " ..." if len(found) > MOST_NAMED else ""
    whose = "with features that are not finite, " if bad is not None and bad.any() else ""
    return f"{whose}sample ids {', '.join(named)}{more}"
