"""Images as users have them, to pixels: paths, URIs, folders, encoded bytes, images of Pillow, arrays, tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from pipeline.data.entries import MAX_PIXELS
from pipeline.data.image_faults import explain
from pipeline.data.image_files import read_image, rgb_pixels
from pipeline.data.image_folders import list_files
from pipeline.errors import RunError, UserError, one_line
from pipeline.storage import Folder
from pipeline.storage.folder import read_file

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
_TYPES = (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor)  # what `isinstance` takes
_EXPECTED = "a path, a folder, bytes, an image of Pillow, or uint8 [3, H, W] or [H, W, 3], or several of these"


class ImageError(UserError):
    """An image that cannot be read.

    Attributes:
        image: What it is called: its path, or its place among the images.
        reason: Why, one line without the name.
    """

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"{image}: {reason}")
        self.image, self.reason = image, reason

    def __reduce__(self) -> Any:
        return ImageError, (self.image, self.reason)


def image_inputs(images: Any) -> Iterator[tuple[str, ImageInput]]:
    """Each image with its name (its path, or its place), in order; nothing is read yet, but the names of a folder's files.

    Args:
        images: One image, a folder (all images below it, sorted by path), a uint8 batch [N, 3, H, W], or any iterable of
            images and folders.

    Raises:
        UserError: It is something else; a folder has no images.
    """
    place = 0
    for image in _several(images):
        if not isinstance(image, _TYPES):
            raise UserError(f"got an image of type {type(image).__name__}, expected {_EXPECTED}")
        for name, found in _named(image):
            yield name or f"image {place}", found
            place += 1


def _several(images: Any) -> Iterable[Any]:
    is_batch = isinstance(images, Tensor | np.ndarray) and images.ndim == 4
    if isinstance(images, _TYPES) and not is_batch:
        return [images]
    if not isinstance(images, Iterable):
        raise UserError(f"got images of type {type(images).__name__}, expected {_EXPECTED}")
    return images


def _named(image: ImageInput) -> Iterator[tuple[str, ImageInput]]:
    """The image, or those of the folder, with the path as name; "" for what has none."""
    if not isinstance(image, str | os.PathLike):
        yield "", image
        return
    path = os.fspath(image)
    if "://" not in path:
        path = os.path.expanduser(path)
    if "://" not in path and not os.path.isdir(path):
        yield path, path
        return
    folder = Folder(path)
    if not folder.is_local and os.path.splitext(path)[1]:  # an object by its name: no listing is asked for
        yield path, path
        return
    try:
        names = list_files(folder).images
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error})") from error
    if not names:
        raise UserError(f"folder {folder} has no images")
    for name in names:
        yield f"{folder}/{name}", f"{folder}/{name}"


def read_input(name: str, image: ImageInput, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 height width"]:
    """The pixels of an image, as a store would give them.

    Args:
        name: What to call it in an error.
        image: The image.
        max_pixels: Upper bound for width × height.

    Raises:
        ImageError: It cannot be read, is no image, has too many pixels, or is an array of another type or shape.
    """
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        data = None
        try:
            data = read_file(path)
            return read_image(data, max_pixels)
        except Exception as error:  # decoders have no common class of errors
            reason = one_line(error) if isinstance(error, RunError | UserError) else explain(path, data, error)
            raise ImageError(name, _about_pixels(reason)) from error
    if isinstance(image, bytes):
        try:
            return read_image(image, max_pixels)
        except Exception as error:  # as above
            raise ImageError(name, _about_pixels(explain(name, image, error))) from error
    if isinstance(image, Image.Image):
        if image.width * image.height > max_pixels:
            raise ImageError(name, f"{image.width} × {image.height} pixels, at most {max_pixels:,} are accepted")
        try:
            return rgb_pixels(image)
        except Exception as error:  # a file that was opened and is damaged is decoded here
            raise ImageError(name, explain(name, b"\xff\xd8\xff", error)) from error
    return _from_array(name, image)


def _about_pixels(reason: str) -> str:
    """The reason without the option of another command."""
    return reason.replace("more than --max-pixels ", "more than the limit of ")


def _from_array(name: str, image: np.ndarray | Tensor) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    if pixels.ndim == 3 and pixels.shape[0] != 3 and pixels.shape[2] == 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ImageError(
            name, f"got {kind} {list(pixels.shape)}, expected uint8 [3, H, W] or [H, W, 3] with values of 0 to 255"
        )
    return pixels.cpu()


__all__ = ["ImageError", "ImageInput", "image_inputs", "read_input"]
