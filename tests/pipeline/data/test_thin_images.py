"""Strips are resized as torchvision does it, without what it makes in between."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.data.thin_images import is_thin, resized_centre, resized_on_white
from pipeline.data.transforms import TransformConfig, evaluation_pixels, training_pixels


def noise(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height * width).integers(0, 256, (3, height, width), np.uint8))


@pytest.mark.parametrize(("size", "shorter"), [(32, 32), (32, 40), (96, 110)])
@pytest.mark.parametrize("shape", [(2, 60), (90, 3), (7, 113), (1, 40), (150, 2600), (2600, 140)])
def test_the_centre_is_that_of_the_resized_strip(shape: tuple[int, int], size: int, shorter: int) -> None:
    image = noise(*shape)
    whole = F.resize(image, [shorter], interpolation=InterpolationMode.BICUBIC, antialias=True)
    difference = (F.center_crop(whole, [size, size]).int() - resized_centre(image, shorter, size).int()).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.06
    assert is_thin(*shape)


def test_a_rectangle_on_white_is_that_of_the_padded_strip() -> None:
    random = np.random.default_rng(0)
    for height, width in [(2, 60), (60, 2), (30, 520), (1, 40)]:
        image, pad = noise(height, width), int(random.integers(1, max(height, width)))
        rows, columns = int(random.integers(1, height + 2 * pad)), int(random.integers(1, width + 2 * pad))
        top, left = int(random.integers(0, height + 2 * pad - rows)), int(random.integers(0, width + 2 * pad - columns))
        expected = F.resized_crop(F.pad(image, [pad], fill=255), top, left, rows, columns, [24, 24], antialias=True)
        got = resized_on_white(image, top - pad, left - pad, rows, columns, 24)
        assert (expected.int() - got.int()).abs().max() <= 2
    assert (resized_on_white(noise(2, 60), -50, 0, 20, 20, 24) == 255).all(), "beside the image"


@pytest.mark.parametrize("shape", [(48, 40), (16, 256), (256, 16)])
def test_other_images_are_resized_by_torchvision_bit_for_bit(shape: tuple[int, int]) -> None:
    image, config = noise(*shape), TransformConfig(size=32, resize=40, pad=0.2, flip=0)
    whole = F.resize(image, [40], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(evaluation_pixels(image, config), F.center_crop(whole, [32, 32]))
    padded = F.pad(image, [round(0.2 * max(shape))], fill=255)
    unpadded = config.model_copy(update={"pad": 0.0})
    got, expected = (training_pixels(i, c, np.random.default_rng(1)) for i, c in ((image, config), (padded, unpadded)))
    assert torch.equal(got, expected)


def test_a_strip_costs_no_gigabyte() -> None:
    strip = torch.zeros(3, 2, 8000, dtype=torch.uint8)
    config = TransformConfig(size=224, pad=1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert evaluation_pixels(strip, config).shape == training_pixels(strip, config, np.random.default_rng(0)).shape
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB
