"""Folding of frozen batch normalisations into the convolutions before them.

With fixed statistics a batch normalisation is a scale and a shift of each channel, which can move into the convolution:

    bn(conv(x, W) + b) = conv(x, W s) + (b - mean) s + bias,   s = weight / √(var + ε)

The folded kernel is computed in every pass from the present parameters, so that W, weight and bias are trained as before; but
the normalisation needs no pass over the activations, forward, backward or in forward mode, and its input is not kept.
Pairs of convolution and normalisation are found by recording one pass over the network.
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
    """The pairs of convolution and batch normalisation of a network that can be folded.

    Args:
        net: The network, in evaluation mode.
        inputs: Example input.

    Attributes:
        pairs: Convolutions, each with the batch normalisation that is the only consumer of its output.
    """

    def __init__(self, net: nn.Module, inputs: Tensor) -> None:
        with torch.no_grad():
            recorder = _PairRecorder(net)
            with recorder:
                net(inputs)
            self.pairs = list(recorder.pairs.values())
            if self.pairs and not self._folds_exactly(net, inputs):
                self.pairs = []

    def __call__(self) -> AbstractContextManager[Any]:
        """Within it the network's frozen batch normalisations are folded; those in training mode are not."""
        frozen = [pair for pair in self.pairs if not pair[1].training]
        return _FoldedMode(frozen) if frozen else nullcontext()

    def _folds_exactly(self, net: nn.Module, inputs: Tensor) -> bool:
        """True if the folded network computes the same, tested with random statistics that are far from the identity."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(inputs.shape, generator=generator).to(inputs)
        tensors = [
            tensor
            for m in net.modules()
            if isinstance(m, _BatchNorm)
            for tensor in m.state_dict(keep_vars=True).values()
        ]
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        saved = [tensor.clone() for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            expected = net(inputs)
            with self():
                folded = net(inputs)
        finally:
            for tensor, old in zip(tensors, saved, strict=True):
                tensor.copy_(old)
        # a wrong pair would give a difference of the order of the output
        return bool((folded - expected).norm() <= 1e-3 * expected.norm())


class _PairRecorder(TorchFunctionMode):
    """Records the batch normalisation that takes the output of each convolution."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.convolutions = {id(m.weight): m for m in net.modules() if isinstance(m, nn.Conv2d)}
        self.normalisations = {id(m.weight): m for m in net.modules() if isinstance(m, _BatchNorm) and m.affine}
        self.pairs: dict[int, Pair] = {}
        self._outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # keeps the tensors alive, so that ids stay unique

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.conv2d and id(args[1]) in self.convolutions:
            self._outputs[id(output)] = (output, self.convolutions[id(args[1])])
        elif func is F.batch_norm:
            convolution_output = self._outputs.get(id(args[0]))
            norm = self.normalisations.get(id(_weight(args, kwargs)))
            if convolution_output is not None and norm is not None and norm.running_mean is not None:
                self.pairs[id(convolution_output[1])] = (convolution_output[1], norm)
        return output


class _FoldedMode(TorchFunctionMode):
    """Replaces kernels of convolutions by folded ones, and normalisations by the identity."""

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
