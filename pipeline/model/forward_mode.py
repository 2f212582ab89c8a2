"""Forward-mode derivatives of a trunk's features along a direction of its parameters, in one pass, without a graph.

A pass costs three convolutions for each of the network: the output, and its derivatives with respect to input and kernel. Where
the same images were encoded just before, `Outputs` has kept the outputs of convolutions, paddings and clamps (most of them are
in memory for the backward pass anyway), and the first of the three is not computed again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_CLAMPS = (F.relu, F.relu6, F.hardtanh)  # activations whose derivative follows from their output
_KEPT_FUNCTIONS = (F.conv2d, F.pad, *_CLAMPS)


class Outputs(TorchFunctionMode):
    """Context manager that keeps outputs of a forward pass, for `derivative` of the same pass."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[_KeptOutput] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _KEPT_FUNCTIONS:
            last_kept = self._kept[-1] if self._kept else None
            if func in _CLAMPS and last_kept is not None and last_kept.output.data_ptr() == output.data_ptr():
                # In place: a convolution's output was clamped. Clamping it once more changes nothing.
                self._kept[-1] = last_kept._replace(version=output._version)
            self._kept.append(_KeptOutput(func, output.detach(), output._version))
        return output

    def of(self, images: slice) -> list[_KeptOutput]:
        """Outputs of some images of the pass; None for those that were overwritten since."""
        is_current = [kept.output._version == kept.version for kept in self._kept]
        # Through DLPack: the tensors have a storage of their own, otherwise forward mode would copy them.
        return [
            kept._replace(output=torch.from_dlpack(kept.output[images]) if valid else None)
            for kept, valid in zip(self._kept, is_current, strict=True)
        ]


class _KeptOutput(NamedTuple):
    func: Any
    output: Any  # Tensor, or None: overwritten
    version: int


def derivative(
    trunk: nn.Module,
    run: Callable[[Callable[[Tensor], Tensor]], Tensor],
    direction: Mapping[str, Tensor],
    kept_outputs: list[_KeptOutput] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output of a trunk and its derivative along `direction` of the trunk's parameters, without gradient.

    Args:
        trunk: The trunk.
        run: The function to differentiate; its argument is the trunk with substituted parameters.
        direction: Tangents by parameter name; parameters without one are constant.
        kept_outputs: Outputs of the same pass with the same parameters.
    """
    parameters = {n: p.detach() for n, p in trunk.named_parameters()}

    def with_moved_parameters(moving: dict[str, Tensor]) -> Tensor:
        return run(lambda pixels: torch.func.functional_call(trunk, parameters | moving, (pixels,)))

    # fused attention has no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _ForwardMode(kept_outputs or []):
        result = torch.func.jvp(with_moved_parameters, ({n: parameters[n] for n in direction},), (dict(direction),))
    return result[0], result[1]


class _ForwardMode(TorchFunctionMode):
    """Uses kept outputs instead of computing them, and no in-place operations: forward mode would copy the input first."""

    def __init__(self, kept_outputs: list[_KeptOutput]) -> None:
        super().__init__()
        self._kept: Iterator[_KeptOutput] = iter(kept_outputs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        if func in _KEPT_FUNCTIONS:
            kept = next(self._kept, None)
            if kept is not None and kept.output is not None:
                if kept.func is not func or len(kept.output) != len(args[0]):
                    raise RuntimeError("the kept outputs are not those of this pass")
                if func is F.conv2d and len(args) > 2:
                    return _Convolution.apply(*args[:3], kept, args[3:], kwargs)
                if func in _CLAMPS:
                    return _Clamp.apply(args[0], kept, _bounds(func, args, kwargs))
                if func is F.pad and _pads_with_zeros(*args[2:], **kwargs):
                    return _Padding.apply(args[0], kept, args[1])
        return func(*args, **kwargs)


class _Convolution(torch.autograd.Function):
    """Derivative of a convolution whose output was kept."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, kept: _KeptOutput, args: Any, kwargs: Any
    ) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:2], output)
        ctx.how = inputs[4:]

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Tensor:
        input, kernel, output = ctx.saved_tensors
        args, kwargs = ctx.how
        tangents = [F.conv2d(input, weight, bias, *args, **kwargs)] if weight is not None else []
        if x is not None:
            tangents.append(F.conv2d(x, kernel, None if tangents else bias, *args, **kwargs))
        if not tangents:
            assert bias is not None
            return bias.view(-1, 1, 1).expand_as(output)
        return tangents[0].add_(tangents[1]) if len(tangents) == 2 else tangents[0]


class _Padding(torch.autograd.Function):
    """Derivative of a padding with zeros whose output was kept."""

    @staticmethod
    def forward(x: Tensor, kept: _KeptOutput, widths: Any) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.widths = inputs[2]

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return F.pad(x, ctx.widths)


class _Clamp(torch.autograd.Function):
    """Derivative of a clamp whose output was kept: 1 between the bounds, 0 at and beyond them."""

    @staticmethod
    def forward(x: Tensor, kept: _KeptOutput, bounds: tuple[float, float]) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_forward(output)
        ctx.bounds = inputs[2]

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return torch.ops.aten.hardtanh_backward(x, ctx.saved_tensors[0], *ctx.bounds)


def _bounds(func: Any, args: Any, kwargs: Any) -> tuple[float, float]:
    """The bounds between which a clamp is the identity."""
    if func is not F.hardtanh:
        return (0.0, 6.0 if func is F.relu6 else torch.inf)
    bound = inspect.signature(F.hardtanh).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments["min_val"], bound.arguments["max_val"]


def _pads_with_zeros(mode: str = "constant", value: float | int | None = None) -> bool:
    """True if these arguments of `F.pad` mean constant padding with zeros."""
    return mode == "constant" and not value
