"""Resizing very long images without larger images in between.

A strip of 2 × 8,000 pixels, resized to a height of 224, has 896,000 columns, of which the centre crop
keeps 224; with a white border as wide as its length it has 384 million pixels. Here what is outside
of the crop is never made, nor is the border: the same filters (bicubic with a = -0.5, or bilinear,
widened where they reduce) are applied as two small matrices. Values differ from those of torchvision
by at most 2 of 255, and in most pixels not at all: its kernels round to fixed-point weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

MAX_ASPECT = 16  # longer images are resized here; all others as ever, bit for bit


def is_thin(height: int, width: int) -> bool:
    """Whether the longer side is more than 16 times the shorter."""
    return max(height, width) > MAX_ASPECT * min(height, width)


def resized_centre(image: UInt8[Tensor, "3 h w"], shorter: int, size: int) -> UInt8[Tensor, "3 size size"]:
    """The centre crop of an image that is resized to a shorter side of `shorter` pixels.

    Memory: the part of the source that the crop shows, and the crop, in float32.

    Args:
        image: The source.
        shorter: Its shorter side once resized, at least `size`.
        size: Side of the crop.
    """
    height, width = image.shape[-2:]
    longer = int(shorter * max(height, width) / min(height, width))
    rows, columns = (longer, shorter) if height > width else (shorter, longer)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    first_row, down = _filter(height, rows, top, size)
    first_column, across = _filter(width, columns, left, size)
    part = image[:, first_row : first_row + down.shape[1], first_column : first_column + across.shape[1]].float()
    narrow = (part @ across.T).round_().clamp_(0, 255)  # torchvision's kernel rounds between its two passes as well
    return (down @ narrow).round_().clamp_(0, 255).to(torch.uint8)


def resized_on_white(
    image: UInt8[Tensor, "3 h w"], top: int, left: int, height: int, width: int, size: int
) -> UInt8[Tensor, "3 size size"]:
    """A rectangle of an image that lies on an endless white ground, resized to a square (bilinear).

    Memory: the part of the image in the rectangle, and the square, in float32.

    Args:
        image: The image.
        top, left, height, width: The rectangle, in pixels of the image; it may reach beyond it.
        size: Side of the square.
    """
    down = _inside(height, top, image.shape[-2], size)
    across = _inside(width, left, image.shape[-1], size)
    below_white = image[
        :, *(slice(max(start, 0), max(start + length, 0)) for start, length in ((top, height), (left, width)))
    ]
    return (255 + down @ (below_white.float() - 255) @ across.T).round_().clamp_(0, 255).to(torch.uint8)


def _inside(length: int, start: int, available: int, size: int) -> Float[Tensor, "size taps"]:
    """Weights of a resized line for those of its pixels, from `start` on, that are among the `available` ones."""
    first, weights = _filter(length, size, 0, size, bicubic=False)
    assert first == 0 and weights.shape[1] == length
    return weights[:, max(-start, 0) : max(available - start, 0)]


def _filter(
    source: int, target: int, start: int, size: int, bicubic: bool = True
) -> tuple[int, Float[Tensor, "size taps"]]:
    """Weights of some pixels of a resized line: the first source pixel that they need, and a matrix.

    Args:
        source: Pixels of the line.
        target: Pixels once resized.
        start, size: The pixels of the result that are wanted.
        bicubic: The filter; else bilinear.
    """
    scale = source / target
    widened = max(scale, 1.0)
    support = (2 if bicubic else 1) * widened
    centres = (torch.arange(start, start + size, dtype=torch.float64) + 0.5) * scale
    low = (centres - support + 0.5).long().clamp(min=0)
    high = (centres + support + 0.5).long().clamp(max=source)
    first = int(low[0])
    positions = torch.arange(first, int(high[-1]))
    x = ((positions + 0.5 - centres[:, None]) / widened).abs()
    if bicubic:
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    else:
        weights = (1 - x).clamp(min=0)
    weights *= (positions >= low[:, None]) & (positions < high[:, None])
    return first, (weights / weights.sum(1, keepdim=True)).float()
