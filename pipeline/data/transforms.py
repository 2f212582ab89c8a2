"""A decoded image to a uint8 tensor [3, S, S]: augment or crop, resize. Normalisation happens on the device.

Random draws come from a generator keyed by (seed, epoch, step, slot): the pixels of a slot depend
on nothing else.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from pydantic import Field, model_validator
from torch import Tensor

from methods import plugins
from methods.config import BaseConfig
from pipeline.data.thin_images import is_thin, resized_centre, resized_on_white
from pipeline.errors import RunError


class TransformConfig(BaseConfig):
    """Pixels for training and for evaluation."""

    training: str | None = Field(
        None,
        description="module:FUNCTION of your own, (image uint8 [3, h, w], size, numpy generator) -> uint8 [3, size, size], "
        "instead of all that is training below",
    )
    evaluation: str | None = Field(
        None,
        description="module:FUNCTION of your own, (image uint8 [3, h, w], size) -> uint8 [3, size, size], instead of resize "
        "and centre crop",
    )
    size: int = Field(224, ge=8, description="side of the square that the network sees, pixels")
    resize: int | None = Field(None, ge=8, description="evaluation: shorter side before the centre crop (none: size)")
    evaluation_scale: float = Field(
        1.0,
        ge=0.5,
        le=2,
        description="evaluation: `size` and `resize` times this; above 1, since random crops show things larger than whole images do",
    )
    squash: bool = Field(False, description="evaluation: resize both sides to `size`, ignoring the aspect ratio")
    decode_at_least: int | None = Field(
        None,
        ge=8,
        description="training: JPEGs are decoded at 1/2, 1/4 or 1/8 as long as their shorter side keeps this many pixels (none: "
        "whole); faster for large photographs, the pixels differ",
    )
    crop_scale: tuple[float, float] = Field(
        (0.16, 1.0), description="training: share of the area that a crop covers; [1, 1]: the whole image, not cropped"
    )
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="training: width / height of a crop")
    pad: float = Field(0.0, ge=0, le=1, description="training: white border added first, relative to the side")
    rotate: float = Field(0.0, ge=0, le=180, description="training: rotation by up to this many degrees, on white")
    flip: float = Field(0.5, ge=0, le=1, description="training: probability of a horizontal flip")
    jitter: float = Field(0.0, ge=0, lt=1, description="training: brightness, contrast, saturation by 1 ± this")
    hue: float = Field(0.0, ge=0, le=0.5, description="training: hue turned by up to this share of the circle")
    grey: float = Field(0.0, ge=0, le=1, description="training: probability of dropping colour")
    erase: float = Field(
        0.0, ge=0, le=1, description="training: probability of painting over a rectangle of 2 to 40 % of the area"
    )
    erase_colour: tuple[int, int, int] = Field(
        (161, 144, 129), description="training: colour of the rectangle that `erase` paints (red, green, blue, 0..255)"
    )

    @model_validator(mode="after")
    def _check(self) -> TransformConfig:
        for name, (low, high) in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} is {low, high}, expected 0 < low <= high")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale goes up to {self.crop_scale[1]}, at most 1: use pad to zoom out")
        if not all(0 <= value <= 255 for value in self.erase_colour):
            raise ValueError(f"erase_colour is {self.erase_colour}, expected three values of 0 to 255")
        grey = torch.full((3, 40, 50), 128, dtype=torch.uint8)
        try:
            if self.training is not None:
                _own_pixels(self.training, grey, self.size, np.random.default_rng(0))
            if self.evaluation is not None:
                _own_pixels(self.evaluation, grey, self.of_evaluation().size)
        except RunError as error:
            raise ValueError(str(error)) from error
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize is {self.resize}, smaller than size {self.size}")
        if self.decode_at_least is not None and self.decode_at_least < self.size:
            raise ValueError(f"decode_at_least is {self.decode_at_least}, smaller than size {self.size}")
        return self

    def of_evaluation(self) -> TransformConfig:
        """The same with the sizes of evaluation, `size` and `resize` scaled: what embeds images outside of training steps.

        Source: Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019.
        """
        if self.evaluation_scale == 1:
            return self
        size, resize = (side and round(side * self.evaluation_scale) for side in (self.size, self.resize))
        return self.model_copy(update={"size": size, "resize": resize, "evaluation_scale": 1.0})


@functools.cache
def _torchvision() -> tuple[Any, Any]:
    """torchvision's functions on images and its enumeration of interpolations.

    Imported at the first image: every config imports this module. Looked up once: it takes as long as a tenth of a crop.
    """
    from pipeline.vision_libraries import torchvision

    return torchvision.transforms.v2.functional, torchvision.transforms.v2.InterpolationMode


def _own_pixels(name: str, image: Tensor, size: int, *random: np.random.Generator) -> Tensor:
    """What a user's function makes of an image.

    Raises:
        ValueError: There is no such function.
        RunError: It raises an error, or gives something else than pixels of this size.
    """
    function = plugins.load(name, "transform")
    try:
        pixels = function(image, size, *random)
    except Exception as error:  # whatever a user's function raises
        raise RunError(
            f"transform {name!r} failed on an image {tuple(image.shape)}: {plugins.failure(error)}"
        ) from error
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or tuple(pixels.shape) != (3, size, size):
        got = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise RunError(f"transform {name!r} gives {got}, expected torch.uint8 [3, {size}, {size}]")
    return pixels


def evaluation_pixels(image: UInt8[Tensor, "3 h w"], config: TransformConfig) -> UInt8[Tensor, "3 size size"]:
    """Resize and centre crop, without randomness; or the user's own function."""
    if config.evaluation is not None:
        return _own_pixels(config.evaluation, image, config.size)
    F, mode = _torchvision()
    size = [config.size, config.size]
    if config.squash or (image.shape[-1] == image.shape[-2] and config.resize in (None, config.size)):
        return F.resize(image, size, interpolation=mode.BICUBIC, antialias=True)
    if is_thin(*image.shape[-2:]):
        return resized_centre(image, config.resize or config.size, config.size)
    image = F.resize(image, [config.resize or config.size], interpolation=mode.BICUBIC, antialias=True)
    return F.center_crop(image, size)


def training_pixels(
    image: UInt8[Tensor, "3 h w"], config: TransformConfig, random: np.random.Generator
) -> UInt8[Tensor, "3 size size"]:
    """Random rotation, padding, crop and flip, then colour; each only where configured; or the user's own function."""
    if config.training is not None:
        return _own_pixels(config.training, image, config.size, random)
    F, mode = _torchvision()
    if config.rotate:
        angle = float(random.uniform(-config.rotate, config.rotate))
        image = F.rotate(image, angle, interpolation=mode.BILINEAR, fill=255)
    pad = round(config.pad * max(image.shape[-2:]))
    top, left, height, width = _crop(image.shape[-2] + 2 * pad, image.shape[-1] + 2 * pad, config, random)
    if pad and is_thin(*image.shape[-2:]):
        image = resized_on_white(image, top - pad, left - pad, height, width, config.size)
    else:
        image = F.pad(image, [pad], fill=255) if pad else image
        image = F.resized_crop_image(image, top, left, height, width, [config.size, config.size], antialias=True)
    if random.random() < config.flip:
        image = F.horizontal_flip_image(image)
    if config.jitter:
        brightness, contrast, saturation = random.uniform(1 - config.jitter, 1 + config.jitter, 3).tolist()
        image = F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
        image = F.adjust_saturation(image, saturation)
    if config.hue:
        image = F.adjust_hue(image, float(random.uniform(-config.hue, config.hue)))
    if random.random() < config.grey:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if config.erase and random.random() < config.erase:
        image = _erase(image, config, random)
    return image


def _erase(image: Tensor, config: TransformConfig, random: np.random.Generator) -> Tensor:
    """Paints over a random rectangle (random erasing, Zhong et al., AAAI 2020), of aspect ratio 0.3 to 1 / 0.3."""
    side = config.size
    for _ in range(100):  # until one fits, as the paper does
        area, ratio = side * side * random.uniform(0.02, 0.4), random.uniform(0.3, 1 / 0.3)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < side and 0 < width < side:
            top, left = int(random.integers(0, side - height + 1)), int(random.integers(0, side - width + 1))
            colour = torch.tensor(config.erase_colour, dtype=torch.uint8)[:, None, None]
            return _torchvision()[0].erase(image, top, left, height, width, colour)
    return image


def _crop(height: int, width: int, config: TransformConfig, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: area and aspect ratio as configured, cut to the image.

    One draw: a crop that would be higher or wider than the image gets the image's side. torchvision's RandomResizedCrop draws up to
    ten times until one fits, and so has fewer crops of the full height or width.
    """
    if config.crop_scale == (1.0, 1.0):
        return 0, 0, height, width
    area = height * width * random.uniform(*config.crop_scale)
    ratio = math.exp(random.uniform(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    return int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1)), h, w
