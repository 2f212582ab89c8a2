"""Convolutions that do the work of the frozen batch normalisations after them.

With fixed statistics a batch normalisation is a scale and a shift of each channel, which can move into the convolution:

    bn(conv(x, W) + b) = conv(x, W s) + (b - mean) s + bias,   s = weight / √(var + ε)

The folded kernel is made anew in every pass, from the parameters as they are, so that W, weight and bias learn as before; but
no pass over the activations is made for the normalisation, forward, backward or in forward mode, and its input is not kept.
Which normalisation follows which convolution is found by watching one pass over the network.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

Pair = tuple[nn.Conv2d, _BatchNorm]


class Folding:
    """What can be folded in a network.

    Args:
        net: in evaluation mode.
        inputs: what it can be run on.

    Attributes:
        pairs: convolutions, each with the batch normalisation that its output goes to and nowhere else.
    """

    def __init__(self, net: nn.Module, inputs: Tensor) -> None:
        with torch.no_grad():
            watch = _Watch(net)
            with watch:
                net(inputs)
            self.pairs = list(watch.pairs.values())
            if self.pairs and not self._holds(net, inputs):
                self.pairs = []

    def __call__(self) -> AbstractContextManager[Any]:
        """Within it the network's frozen batch normalisations are folded; those in training mode are not."""
        frozen = [pair for pair in self.pairs if not pair[1].training]
        return _Folded(frozen) if frozen else nullcontext()

    def _holds(self, net: nn.Module, inputs: Tensor) -> bool:
        """Whether the folded network computes the same, with normalisations that are far from doing nothing."""
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(inputs.shape, generator=random).to(inputs)
        tensors = [v for m in net.modules() if isinstance(m, _BatchNorm) for v in m.state_dict(keep_vars=True).values()]
        tensors = [v for v in tensors if v.is_floating_point()]
        saved = [v.clone() for v in tensors]
        try:
            for v in tensors:
                v.copy_(0.5 + torch.rand(v.shape, generator=random))
            plain = net(inputs)
            with self():
                folded = net(inputs)
        finally:
            for v, old in zip(tensors, saved, strict=True):
                v.copy_(old)
        # a mistake would be of the order of the thing itself
        return bool((folded - plain).norm() <= 1e-3 * plain.norm())


class _Watch(TorchFunctionMode):
    """Notes which batch normalisation is given the output of which convolution."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.convolutions = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d)}
        self.normalisations = {id(m.weight): m for m in net.modules() if isinstance(m, _BatchNorm) and m.affine}
        self.pairs: dict[int, Pair] = {}
        self._outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # kept alive: an id is not given twice then

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d and id(args[1]) in self.convolutions:
            self._outputs[id(out)] = (out, self.convolutions[id(args[1])])
        elif func is F.batch_norm:
            known = self._outputs.get(id(args[0]))
            norm = self.normalisations.get(id(_weight(args, kwargs)))
            if known is not None and norm is not None and norm.running_mean is not None:
                self.pairs[id(known[1])] = (known[1], norm)
        return out


class _Folded(TorchFunctionMode):
    """Gives convolutions their folded kernels, and takes the normalisations out."""

    def __init__(self, pairs: list[Pair]) -> None:
        super().__init__()
        self.kernels: dict[int, tuple[Tensor, Tensor]] = {}
        self.normalisations = {id(norm.weight) for _, norm in pairs}
        for conv, norm in pairs:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            centre = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            self.kernels[id(conv.weight)] = (conv.weight * scale.view(-1, 1, 1, 1), centre * scale + norm.bias)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and id(args[1]) in self.kernels:
            return F.conv2d(args[0], *self.kernels[id(args[1])], *args[3:], **(kwargs or {}))
        if func is F.batch_norm and id(_weight(args, kwargs)) in self.normalisations:
            return args[0]
        return func(*args, **(kwargs or {}))


def _weight(args: Any, kwargs: Any) -> Tensor | None:
    """The weight that `F.batch_norm` is called with."""
    return args[3] if len(args) > 3 else (kwargs or {}).get("weight")
