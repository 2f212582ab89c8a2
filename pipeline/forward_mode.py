"""Forward-mode derivatives of a convolutional trunk, in less time than its forward and backward pass.

`torch.func.jvp` differentiates a frozen batch normalisation by half a dozen passes over its activations. Frozen, it is a
scale and a shift of each channel, which can be moved into the convolution before it:

    bn(conv(x, W) + b) = conv(x, W s) + (b - mean) s + bias,   s = weight / √(var + ε)

so that convolutions alone touch activations. Which normalisation follows which convolution is found by watching one pass;
the folded trunk is then compared with the trunk itself, and not used where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Parameters = Mapping[str, Tensor]
Run = Callable[[Callable[[Tensor], Tensor]], Tensor]


class Fold(NamedTuple):
    """A convolution and the batch normalisation after it, by the names of their parameters.

    Attributes:
        kernel, offset: weight and bias (if any) of the convolution.
        weight, bias: of the normalisation.
        mean, var, eps: what it normalises with.
    """

    kernel: str
    offset: str | None
    weight: str
    bias: str
    mean: Tensor
    var: Tensor
    eps: float

    def shift(self) -> str:
        """Name under which the folded convolution's bias goes."""
        return f"{self.kernel}/shift"

    def apply(self, at: dict[str, Tensor], along: dict[str, Tensor]) -> None:
        """Puts the folded kernel and shift, and their derivatives, into both."""
        root = torch.rsqrt(self.var + self.eps)
        zero = torch.zeros_like(root)
        scale, scale_along = at[self.weight] * root, along.get(self.weight, zero) * root
        centre = -self.mean if self.offset is None else at[self.offset] - self.mean
        centre_along = zero if self.offset is None else along.get(self.offset, zero)
        kernel = at[self.kernel]
        kernel_along = along.get(self.kernel, torch.zeros_like(kernel))
        shape = (-1, *[1] * (kernel.ndim - 1))
        at[self.kernel] = kernel * scale.view(shape)
        along[self.kernel] = kernel_along * scale.view(shape) + kernel * scale_along.view(shape)
        at[self.shift()] = centre * scale + at[self.bias]
        along[self.shift()] = centre_along * scale + centre * scale_along + along.get(self.bias, zero)


class ForwardMode:
    """Derivatives of one trunk with frozen batch normalisation.

    Args:
        trunk: that is differentiated.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk
        self._folds: list[Fold] | None = None

    def __call__(self, run: Run, direction: Parameters) -> tuple[Tensor, Tensor]:
        """Output and its derivative when the parameters move along `direction`, without gradient.

        Args:
            run: what is differentiated: a function of (the trunk with some parameters).
            direction: by parameter; those that are not named stand still.
        """
        # fused attention has no forward mode
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if self._folds is None:
                self._folds = self._find(run, direction)
            return self._derive(run, direction, self._folds)

    def _find(self, run: Run, direction: Parameters) -> list[Fold]:
        watch = _Watch({id(p): n for n, p in self.trunk.named_parameters()})
        with watch:
            run(self.trunk)
        found = list(watch.folds.values())
        plain, folded = (self._derive(run, direction, folds) for folds in ([], found))
        # A mistake would be of the order of the thing itself; rounding is 1e-3 of a derivative in float32.
        alike = all(float((a - b).norm()) <= 1e-2 * float(a.norm()) + 1e-12 for a, b in zip(plain, folded, strict=True))
        return found if alike else []

    def _derive(self, run: Run, direction: Parameters, folds: Sequence[Fold]) -> tuple[Tensor, Tensor]:
        at = {n: p.detach() for n, p in self.trunk.named_parameters()}
        names, along = list(at), dict(direction)
        for fold in folds:
            fold.apply(at, along)

        def call(moving: dict[str, Tensor]) -> Tensor:
            parameters = at | moving
            with _Folded(parameters, folds):
                own = {n: parameters[n] for n in names}
                return run(lambda pixels: torch.func.functional_call(self.trunk, own, (pixels,)))

        found = torch.func.jvp(call, ({n: at[n] for n in along},), (along,))
        return found[0], found[1]


class _Watch(TorchFunctionMode):
    """Notes which batch normalisation is given the output of which convolution."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.folds: dict[str, Fold] = {}
        self._outputs: dict[int, tuple[Tensor, str, str | None]] = {}  # kept alive: an id is not given twice then

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d and len(args) > 2 and id(args[1]) in self.names:
            self._outputs[id(out)] = (out, self.names[id(args[1])], self.names.get(id(args[2])))
        elif func is F.batch_norm:
            self._normalised(*args, **(kwargs or {}))
        return out

    def _normalised(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        known = self._outputs.get(id(input))
        if known is None or training or running_mean is None or running_var is None:
            return
        if id(weight) in self.names and id(bias) in self.names:
            names = (known[1], known[2], self.names[id(weight)], self.names[id(bias)])
            self.folds[known[1]] = Fold(*names, running_mean, running_var, eps)


class _Folded(TorchFunctionMode):
    """Convolutions do the work of the batch normalisations after them; nothing is computed in place."""

    def __init__(self, parameters: Parameters, folds: Sequence[Fold]) -> None:
        super().__init__()
        self.shifts = {id(parameters[fold.kernel]): parameters[fold.shift()] for fold in folds}
        self.normalisations = {id(parameters[fold.weight]) for fold in folds}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and id(args[1]) in self.shifts:
            input, kernel, _, *rest = args
            return F.conv2d(input, kernel, self.shifts[id(kernel)], *rest, **kwargs)
        if func is F.batch_norm:
            weight = args[3] if len(args) > 3 else kwargs.get("weight")
            if id(weight) in self.normalisations:
                return args[0]
        if kwargs.get("inplace"):
            kwargs = kwargs | {"inplace": False}  # the input would be copied first
        return func(*args, **kwargs)
