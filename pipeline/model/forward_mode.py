"""Forward-mode derivatives of a trunk: how its features move when its parameters do, in one pass, without a graph.

A pass costs three convolutions for each of the network: the output, and its derivative by input and by kernel. Where the same
images were encoded just before, `Outputs` has kept what convolutions, their paddings and clamps gave, most of it for the backward
pass anyway, and the first of the three falls away.
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

_CLAMPS = (F.relu, F.relu6, F.hardtanh)  # activations whose output tells their derivative
_KEPT = (F.conv2d, F.pad, *_CLAMPS)


class Outputs(TorchFunctionMode):
    """Within it, a pass over a network keeps outputs, for `derivative` of the same pass."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[_Kept] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _KEPT:
            last = self._kept[-1] if self._kept else None
            if func in _CLAMPS and last is not None and last.output.data_ptr() == out.data_ptr():
                # In place: a convolution's output was clamped. Clamping it once more changes nothing.
                self._kept[-1] = last._replace(version=out._version)
            self._kept.append(_Kept(func, out.detach(), out._version))
        return out

    def of(self, images: slice) -> list[_Kept]:
        """Outputs of some images of the pass; without those that were written to since."""
        current = [k.output._version == k.version for k in self._kept]
        # Through DLPack, whose tensors have a storage of their own: forward mode copies into a new one of the same size else.
        return [
            k._replace(output=torch.from_dlpack(k.output[images]) if c else None)
            for k, c in zip(self._kept, current, strict=True)
        ]


class _Kept(NamedTuple):
    func: Any
    output: Any  # Tensor, or None: not known any more
    version: int


def derivative(
    trunk: nn.Module,
    run: Callable[[Callable[[Tensor], Tensor]], Tensor],
    direction: Mapping[str, Tensor],
    known: list[_Kept] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and its derivative when the trunk's parameters move along `direction`, without gradient.

    Args:
        trunk: whose parameters move.
        run: what is differentiated: a function of (the trunk with some parameters).
        direction: by parameter; those that are not named stand still.
        known: what the same pass gave with the same parameters.
    """
    at = {n: p.detach() for n, p in trunk.named_parameters()}

    def call(moving: dict[str, Tensor]) -> Tensor:
        return run(lambda pixels: torch.func.functional_call(trunk, at | moving, (pixels,)))

    # fused attention has no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Forward(known or []):
        found = torch.func.jvp(call, ({n: at[n] for n in direction},), (dict(direction),))
    return found[0], found[1]


class _Forward(TorchFunctionMode):
    """Takes what is known instead of computing it; computes nothing in place: forward mode would copy the input first."""

    def __init__(self, known: list[_Kept]) -> None:
        super().__init__()
        self._known: Iterator[_Kept] = iter(known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        if func in _KEPT:
            kept = next(self._known, None)
            if kept is not None and kept.output is not None:
                if kept.func is not func or len(kept.output) != len(args[0]):
                    raise RuntimeError("what is known is not of this pass")
                if func is F.conv2d and len(args) > 2:
                    return _Convolution.apply(*args[:3], kept, args[3:], kwargs)
                if func in _CLAMPS:
                    return _Clamp.apply(args[0], kept, _bounds(func, args, kwargs))
                if func is F.pad and _with_zeros(*args[2:], **kwargs):
                    return _Padding.apply(args[0], kept, args[1])
        return func(*args, **kwargs)


class _Convolution(torch.autograd.Function):
    """Derivative of a convolution whose output is known."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, kept: _Kept, args: Any, kwargs: Any) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(*inputs[:2], output)
        ctx.how = inputs[4:]

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, *_: Any) -> Tensor:
        at_x, at_weight, output = ctx.saved_tensors
        args, kwargs = ctx.how
        parts = [F.conv2d(at_x, weight, bias, *args, **kwargs)] if weight is not None else []
        if x is not None:
            parts.append(F.conv2d(x, at_weight, None if parts else bias, *args, **kwargs))
        if not parts:
            assert bias is not None
            return bias.view(-1, 1, 1).expand_as(output)
        return parts[0].add_(parts[1]) if len(parts) == 2 else parts[0]


class _Padding(torch.autograd.Function):
    """Derivative of a padding with zeros whose output is known."""

    @staticmethod
    def forward(x: Tensor, kept: _Kept, widths: Any) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.widths = inputs[2]

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return F.pad(x, ctx.widths)


class _Clamp(torch.autograd.Function):
    """Derivative of a clamp whose output is known: 1 between the bounds, 0 at and beyond them."""

    @staticmethod
    def forward(x: Tensor, kept: _Kept, bounds: tuple[float, float]) -> Tensor:
        return kept.output

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_forward(output)
        ctx.bounds = inputs[2]

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return torch.ops.aten.hardtanh_backward(x, ctx.saved_tensors[0], *ctx.bounds)


def _bounds(func: Any, args: Any, kwargs: Any) -> tuple[float, float]:
    """Between which a clamp leaves its input alone."""
    if func is not F.hardtanh:
        return (0.0, 6.0 if func is F.relu6 else torch.inf)
    found = inspect.signature(F.hardtanh).bind(*args, **kwargs)
    found.apply_defaults()
    return found.arguments["min_val"], found.arguments["max_val"]


def _with_zeros(mode: str = "constant", value: float | int | None = None) -> bool:
    """Whether these arguments of `F.pad` say so."""
    return mode == "constant" and not value
