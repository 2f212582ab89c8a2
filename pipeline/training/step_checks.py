"""What a step computes on a device and the host reads: whether its losses and gradients are finite, the values to log, a stop request.

A read makes the host wait until the device has computed everything before it, so a step reads once: what its losses and gradients
are is collected on the device, agreed by all ranks there, and read together before an optimizer moves anything. A request to stop, which
all ranks have to follow after the same step, goes along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from methods.base import MethodError
from pipeline.distributed.collectives import Ranks


class StepChecks:
    """The losses of a step that have not been read yet.

    Args:
        ranks: This worker's rank and the collectives.
        device: Device of the losses.
        asked_to_stop: Whether this rank has been asked to stop.

    Attributes:
        stop: Whether some rank had been asked to stop at a read of this step; the same on every rank.
        has_read: Whether there was a read in this step.
        losses: Those whose backward pass has run, or which have been checked since the last read.
        not_finite: The loss that the last read found not to be finite here, if any.
    """

    def __init__(self, ranks: Ranks, device: torch.device, asked_to_stop: Callable[[], bool]) -> None:
        self.ranks = ranks
        self.device = device
        self.asked_to_stop = asked_to_stop
        self.stop = self.has_read = False
        self.losses: list[Tensor] = []
        self.not_finite: Tensor | None = None

    def begin_step(self) -> None:
        self.losses = []
        self.not_finite = None
        self.stop = self.has_read = False

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach().to(self.device, non_blocking=True))

    def read(self, *values: Tensor) -> tuple[bool, list[float]]:
        """Whether a loss is not finite on some rank, and `values` (0-dim), read together; the losses are forgotten.

        Args:
            values: Further ones: of each the largest of all ranks.
        """
        losses, self.losses = self.losses, []
        bad = [(~loss.isfinite()).any() for loss in losses]
        asked = torch.full((), float(self.asked_to_stop()), device=self.device)
        found = torch.stack([value.double() for value in (*bad, *values, asked)])
        here, whole = found, self.ranks.largest(found)
        numbers: list[float] = whole.tolist()
        self.has_read, self.stop = True, self.stop or bool(numbers.pop())
        any_bad = any(numbers[: len(bad)])
        if any_bad:
            own = here[: len(bad)].tolist()
            self.not_finite = losses[own.index(1.0) if 1.0 in own else numbers.index(1.0)]
        return any_bad, numbers[len(bad) :]


def overflows(gradients: list[Tensor], device: torch.device) -> Tensor:
    """1 if the sum of some gradient is not finite, else 0; on the device.

    A sum is the cheapest pass that nothing infinite gets through; it may overflow though all gradients are finite.
    """
    if not gradients:
        return torch.zeros((), device=device)
    return (~torch.stack([gradient.sum() for gradient in gradients]).isfinite()).any()


def read_logs(logs: Mapping[str, float | Tensor]) -> dict[str, float]:
    """The numbers that a method returns from a step; those on a device are read together.

    Raises:
        MethodError: A value is a tensor of other than one element.
    """
    waiting = {name: value for name, value in logs.items() if isinstance(value, Tensor)}
    for name, value in waiting.items():
        if value.numel() != 1:
            raise MethodError(
                f"the value {name!r} that training_step returns is a tensor of {tuple(value.shape)}, expected a number or a tensor "
                "of one element"
            )
    on_device = {name: value for name, value in waiting.items() if value.device.type != "cpu"}
    read = {name: float(value.detach()) for name, value in waiting.items() if name not in on_device}
    if on_device:
        stacked = torch.stack([value.detach().double().reshape(()) for value in on_device.values()])
        read |= dict(zip(on_device, stacked.tolist(), strict=True))
    return {name: read[name] if name in read else float(value) for name, value in logs.items()}
