"""Resize and centre crop of evaluation as a part of a network: uint8 images of any size in, pixels of the network's size out.

An antialiased bicubic resize is two products with matrices that depend on the sizes alone:

    out[S, S] = round(D[S, H] · round(x[H, W] · A[W, S])),    D, A: a = -0.5, widened where they reduce, rows sum to one

of which the rows outside the centre crop are never made. Any runtime has matrix products; the antialiasing of ONNX's Resize is
another (a = -0.75 by default, other borders) and few runtimes have it. torchvision rounds its weights to 16 bits and these are
of float32, so that a value may differ from the pipeline's own by up to 2 of 255, and most do not at all.

Time: 3 S (H W + H S) multiplications an image, about that of a ResNet-50 for a photograph of 2,000 × 2,000 pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from pipeline.data.transforms import TransformConfig
from pipeline.errors import UserError


class Preprocessing(nn.Module):
    """uint8 images [B, 3, H, W] to uint8 pixels [B, 3, S, S], as `evaluation_pixels` makes them.

    Args:
        config: The transforms.
        image_size: Height and width of all images; None: any, and the matrices are made for each batch.

    Raises:
        UserError: The evaluation's transform is the user's own function, which is no part of a network.
    """

    down: Tensor | None
    across: Tensor | None

    def __init__(self, config: TransformConfig, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if config.evaluation is not None:
            raise UserError(
                f"data.transforms.evaluation is {config.evaluation!r}, a function of your own, which cannot be a part of the "
                "exported network: leave out --preprocessing, and apply it before the network"
            )
        self.size, self.squash = config.size, config.squash
        self.shorter = config.resize or config.size
        matrices = (None, None) if image_size is None else self._matrices(*image_size)
        for name, matrix in zip(("down", "across"), matrices, strict=True):
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, images: UInt8[Tensor, "batch 3 h w"]) -> UInt8[Tensor, "batch 3 size size"]:
        down, across = self.down, self.across
        if down is None or across is None:
            down, across = self._matrices(*images.shape[-2:])
        narrow = (images.float() @ across).round().clamp(0, 255)  # torchvision rounds between its two passes as well
        return (down @ narrow).round().clamp(0, 255).to(torch.uint8)

    def _matrices(self, num_rows: int | torch.SymInt, num_columns: int | torch.SymInt) -> tuple[Tensor, Tensor]:
        """D [S, H] and A [W, S] for images of this size."""
        height, width = (torch.scalar_tensor(side, dtype=torch.float64) for side in (num_rows, num_columns))
        if self.squash:
            rows = columns = torch.scalar_tensor(self.size, dtype=torch.float64)
        else:
            shortest = torch.minimum(height, width)
            rows, columns = (torch.floor(self.shorter * side / shortest) for side in (height, width))
        return self._filter(height, rows, num_rows), self._filter(width, columns, num_columns).T

    def _filter(self, source: Tensor, target: Tensor, num: int | torch.SymInt) -> Float[Tensor, "size num"]:
        """Weights of the pixels of a resized line that the centre crop shows, for all pixels of the line.

        Args:
            source: Pixels of the line, a number.
            target: Pixels once resized, a number.
            num: `source`, as a length.
        """
        scale = source / target
        widened = scale.clamp(min=1)
        start = torch.round((target - self.size) / 2)
        centres = (torch.arange(self.size, dtype=torch.float64) + start + 0.5) * scale
        low = torch.floor(centres - 2 * widened + 0.5)
        high = torch.floor(centres + 2 * widened + 0.5)
        positions = torch.arange(num, dtype=torch.float64)
        weights = bicubic((positions + 0.5 - centres[:, None]) / widened)
        inside = (positions >= low[:, None]) & (positions < high[:, None])
        weights = torch.where(inside, weights, 0.0)
        return (weights / weights.sum(1, keepdim=True)).float()


def bicubic(x: Float64[Tensor, ...]) -> Float64[Tensor, ...]:
    """The bicubic kernel with a = -0.5."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)
