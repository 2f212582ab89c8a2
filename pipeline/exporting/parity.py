"""Whether an exported network computes what the trained model does, on images made for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipeline.data.transforms import TransformConfig, evaluation_pixels
from pipeline.errors import RunError

BOUND = 1e-5  # of an element of an embedding, relative to the longest embedding
PIXEL_BOUND = 2.0  # of 255
BATCHES = (1, 5)  # images, as the number in a batch is free

Network = Callable[[Tensor], Tensor]


def made_images(num: int, height: int, width: int, seed: int = 0) -> UInt8[Tensor, "num 3 height width"]:
    """Gratings of random colours and directions under noise: edges, smooth parts and all values of a pixel."""
    random = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = random.uniform(-40, 40, (num, 3, 2))
    phase = waves[..., :1, None] * y + waves[..., 1:, None] * x + random.uniform(0, 6, (num, 3, 1, 1))
    images = 127.5 + 110 * np.sin(phase) + random.normal(0, 25, phase.shape)
    return torch.from_numpy(np.clip(images, 0, 255).astype(np.uint8))


@torch.no_grad()
def embedding_difference(network: Network, reference: Network, images: Sequence[Tensor]) -> float:
    """The largest difference of an element over batches of images, relative to the longest embedding; inf if not finite."""
    largest, longest = 0.0, 1.0
    for batch in images:
        got, expected = network(batch).double().cpu(), reference(batch).double().cpu()
        if got.shape != expected.shape:
            return math.inf
        difference = float((got - expected).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        longest = max(longest, float(expected.norm(dim=1).max()))
    return largest / longest


def check(difference: float, bound: float, what: str) -> float:
    """Returns the difference.

    Raises:
        RunError: It is above the bound.
    """
    if not difference <= bound:
        raise RunError(
            f"{what} differs from the trained model by {difference:.2g}, more than {bound:g}: nothing was written; export another "
            "format, and report the backbone"
        )
    return difference


def pixel_difference(preprocess: Network, config: TransformConfig, sizes: Sequence[tuple[int, int]]) -> int:
    """The largest difference of a value, of 255, to the pixels of an evaluation, over images of some sizes [height, width]."""
    largest = 0
    for height, width in sizes:
        images = made_images(2, height, width)
        expected = torch.stack([evaluation_pixels(image, config) for image in images])
        largest = max(largest, int((preprocess(images).int() - expected.int()).abs().max()))
    return largest


def sizes_to_try(config: TransformConfig) -> list[tuple[int, int]]:
    """Heights and widths of images that are reduced, enlarged, upright, wide, square, and of the network's size."""
    size, shorter = config.size, config.resize or config.size
    return [
        (size, size), (shorter, shorter), (2 * size + 3, 3 * size + 1), (size // 2 + 1, size // 3 + 2), (shorter, 2 * shorter + 1),
        (5 * size + 2, size + 1),
    ]  # fmt: skip


def batches(num_pixels: tuple[int, int]) -> list[UInt8[Tensor, "batch 3 height width"]]:
    """Batches of different numbers of images of one size."""
    return [made_images(num, *num_pixels, seed=num) for num in BATCHES]
