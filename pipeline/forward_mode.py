"""Forward-mode derivatives of a trunk: how its features move when its parameters do, in one pass, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def derivative(
    trunk: nn.Module, run: Callable[[Callable[[Tensor], Tensor]], Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Output and its derivative when the trunk's parameters move along `direction`, without gradient.

    Args:
        trunk: whose parameters move.
        run: what is differentiated: a function of (the trunk with some parameters).
        direction: by parameter; those that are not named stand still.
    """
    at = {n: p.detach() for n, p in trunk.named_parameters()}

    def call(moving: dict[str, Tensor]) -> Tensor:
        return run(lambda pixels: torch.func.functional_call(trunk, at | moving, (pixels,)))

    # fused attention has no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _OutOfPlace():
        found = torch.func.jvp(call, ({n: at[n] for n in direction},), (dict(direction),))
    return found[0], found[1]


class _OutOfPlace(TorchFunctionMode):
    """Nothing is computed in place: forward mode would copy the input first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("inplace"):
            kwargs = kwargs | {"inplace": False}
        return func(*args, **kwargs)
