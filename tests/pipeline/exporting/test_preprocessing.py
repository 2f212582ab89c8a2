"""Resize and centre crop as matrix products against the pixels of an evaluation."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.transforms import TransformConfig, evaluation_pixels
from pipeline.errors import UserError
from pipeline.exporting.parity import PIXEL_BOUND, made_images, pixel_difference, sizes_to_try
from pipeline.exporting.preprocessing import Preprocessing, bicubic

SIZES = [(24, 24), (28, 28), (31, 24), (24, 25), (100, 67), (9, 13), (1, 1), (2, 3), (300, 41), (16, 257), (7, 200)]


@pytest.mark.parametrize(
    "config",
    [
        TransformConfig(size=24, resize=28),
        TransformConfig(size=24),
        TransformConfig(size=25, resize=40),
        TransformConfig(size=24, squash=True),
    ],
    ids=["resize and crop", "crop", "odd sizes", "squash"],
)
def test_pixels_are_those_of_an_evaluation(config: TransformConfig) -> None:
    """At most 2 of 255 apart, and nearly all the same; at every size, a free or a stated one."""
    free = Preprocessing(config)
    for height, width in SIZES:
        images = made_images(2, height, width)
        expected = torch.stack([evaluation_pixels(image, config) for image in images])
        stated = Preprocessing(config, (height, width))
        for network in (free, stated):
            pixels = network(images)
            difference = (pixels.int() - expected.int()).abs()
            assert pixels.dtype == torch.uint8 and difference.max() <= PIXEL_BOUND, (height, width)
            assert (difference > 0).double().mean() < 0.06, (height, width)
    assert pixel_difference(free, config, sizes_to_try(config)) <= PIXEL_BOUND


def test_an_image_of_the_right_size_is_left_alone() -> None:
    config = TransformConfig(size=24, resize=28)
    images = made_images(3, 28, 28)
    assert torch.equal(Preprocessing(config)(images), images[:, :, 2:26, 2:26])


def test_a_wrong_crop_would_be_seen() -> None:
    """The images and the bound tell a crop that is off by one pixel, and a resize without antialiasing."""
    config = TransformConfig(size=24, resize=28)

    def off_by_one(images: torch.Tensor) -> torch.Tensor:
        return Preprocessing(config)(images.roll(1, dims=3))

    def jagged(images: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(images.float(), 24, mode="bicubic", antialias=False)
        return small.round().clamp(0, 255).to(torch.uint8)

    assert pixel_difference(off_by_one, config, [(28, 28)]) > 10
    assert pixel_difference(jagged, TransformConfig(size=24), [(96, 96)]) > 10


def test_the_kernel_is_the_cubic_of_keys() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, -0.5], dtype=torch.float64)
    assert bicubic(x).tolist() == [1, 0.5625, 0, -0.0625, 0, 0.5625]


def test_an_own_function_is_no_part_of_a_network() -> None:
    config = TransformConfig(size=24).model_copy(update={"evaluation": "mine:crop"})
    with pytest.raises(UserError, match=r"'mine:crop', a function of your own.*leave out --preprocessing"):
        Preprocessing(config)
