"""Global pooling of what a backbone gives: maps of either layout, or token sequences.

NCHW  [B, C, H, W]   convolutional networks
NHWC  [B, H, W, C]   Swin, MambaOut, Sequencer and others
NLC   [B, L, C]      tokens; the first ones may be class and register tokens, which are left out
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

from torch import Tensor, nn

from pipeline.errors import UserError

_PLACES = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": (1,)}


class Layout(NamedTuple):
    """The axes of a backbone's output.

    Attributes:
        axes: NCHW, NHWC or NLC.
        prefix: NLC: number of tokens at the start that stand for no place of the image.
    """

    axes: Literal["NCHW", "NHWC", "NLC"] = "NCHW"
    prefix: int = 0


MAPS = Layout()  # of convolutional networks


class Pool(nn.Module):
    """Global average, maximum, or their sum, over all places: [B, C, H, W] to [B, C, 1, 1], other layouts alike."""

    def __init__(self, kind: str, layout: Layout = MAPS) -> None:
        super().__init__()
        self.kind = kind
        self.layout = layout

    def forward(self, maps: Tensor) -> Tensor:
        places = _PLACES[self.layout.axes]
        if self.layout.prefix:
            maps = maps[:, self.layout.prefix :]
        if self.kind == "avg":
            return maps.mean(places, keepdim=True)
        if self.kind == "max":
            return maps.amax(places, keepdim=True)
        return maps.mean(places, keepdim=True) + maps.amax(places, keepdim=True)


def layout_of(net: nn.Module, name: str, shape: tuple[int, ...], widths: Collection[int]) -> Layout:
    """The layout of a network's unpooled output.

    Args:
        net: The network.
        name: Its name, for the message.
        shape: Shape of its output for one image.
        widths: Numbers of channels that the output may have, as the network declares them; empty: undeclared, NCHW.

    Raises:
        UserError: The output is none of the layouts, or its channels cannot be told from its places.
    """
    if len(shape) == 4 and not widths:
        return Layout()
    if len(shape) == 4:
        first, last = shape[1] in widths, shape[3] in widths
        if first and last:
            return Layout("NHWC" if getattr(net, "output_fmt", "NCHW") == "NHWC" else "NCHW")
        if first or last:
            return Layout("NCHW" if first else "NHWC")
    if len(shape) == 3 and (not widths or shape[2] in widths):
        prefix = _prefix_tokens(net, shape[1])
        if prefix is not None:
            return Layout("NLC", prefix)
    expected = f" of {' or '.join(map(str, sorted(widths)))} channels" if widths else ""
    given = "pooled features" if len(shape) == 2 else f"{tuple(shape[1:])} for an image"
    raise UserError(
        f"{name} gives {given}, expected maps or tokens{expected} that can be pooled: set model.pooling to native"
    )


def _prefix_tokens(net: nn.Module, num_tokens: int) -> int | None:
    """Number of class and register tokens at the start of a sequence; None: it cannot be told."""
    declared = getattr(net, "num_prefix_tokens", None)
    if declared is None:
        token = getattr(net, "cls_token", None)
        declared = token.shape[1] if isinstance(token, nn.Parameter) and token.ndim == 3 else 0
        if math.isqrt(num_tokens - declared) ** 2 != num_tokens - declared:  # not a square of patches
            return None
    return int(declared) if num_tokens > declared else None
