"""An average of a network's weights, exponential or over the whole run, which is evaluated and kept instead of the newest ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The averages of all parameters of trunk and method (Polyak and Juditsky, 1992); buffers are not averaged.

    Args:
        trunk, method: The network, with the weights that the average starts from.
        decay: Weight of the former average in each step; less in the first steps, (1 + n) / (10 + n) after n of them. 1: the mean of
            the weights at the start and after every step, all with the same weight.
    """

    def __init__(self, trunk: nn.Module, method: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {
            f"{part}.{name}": parameter
            for part, module in (("trunk", trunk), ("method", method))
            for name, parameter in module.named_parameters()
        }
        self._averages: dict[str, Tensor] = {}
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Starts again from the present weights."""
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Adds the present weights, after so many steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps)) if self.decay < 1 else steps / (1 + steps)
        torch._foreach_lerp_(list(self._averages.values()), list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the network has the averages for its weights."""
        trained = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.data = self._averages[name]
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = trained[name]

    def trained(self) -> dict[str, Tensor]:
        """The weights that are trained, on the CPU."""
        return {name: p.detach().cpu().contiguous().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Takes the network's present weights, which were read from a checkpoint, for the averages, and puts the trained ones in place.

        Raises:
            RuntimeError: They are not the network's.
        """
        if trained.keys() != self._parameters.keys():
            raise RuntimeError(f"{len(trained)} trained weights, the network has {len(self._parameters)}")
        self.take()
        for name, parameter in self._parameters.items():
            parameter.copy_(trained[name])
