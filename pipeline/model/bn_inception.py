"""BN-Inception (Ioffe, Szegedy, ICML 2015, arXiv 1502.03167), in the layout of the public Caffe-derived checkpoint.

timm and torchvision do not have it. Names, shapes, biases and pools are those of `bn_inception-52deb4733.pth`, so that its
tensors load by name. Input: RGB in 0..1 minus MEAN, divided by STD; turned to the checkpoint's BGR in 0..255 inside.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (128 / 255, 117 / 255, 104 / 255), (1 / 255, 1 / 255, 1 / 255)
WIDTH = 1024

# block: input channels, 1x1, (3x3 reduce, 3x3), (double reduce, double), pool projection; 0: absent, and stride 2
BLOCKS: dict[str, tuple[int, int, tuple[int, int], tuple[int, int], int]] = {
    "3a": (192, 64, (64, 64), (64, 96), 32),
    "3b": (256, 64, (64, 96), (64, 96), 64),
    "3c": (320, 0, (128, 160), (64, 96), 0),
    "4a": (576, 224, (64, 96), (96, 128), 128),
    "4b": (576, 192, (96, 128), (96, 128), 128),
    "4c": (576, 160, (128, 160), (128, 160), 128),
    "4d": (608, 96, (128, 192), (160, 192), 128),
    "4e": (608, 0, (128, 192), (192, 256), 0),
    "5a": (1056, 352, (192, 320), (160, 224), 128),
    "5b": (1024, 352, (192, 320), (192, 224), 128),
}


class BNInception(nn.Module):
    """The network up to its last feature map: [B, 3, H, W] to [B, 1024, H/32, W/32]."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        for name, (channels, single, (reduce, plain), (double_reduce, double), pool) in BLOCKS.items():
            stride = 1 if single else 2
            block = f"inception_{name}_"
            if single:
                self._add(block + "1x1", channels, single, 1)
            self._add(block + "3x3_reduce", channels, reduce, 1)
            self._add(block + "3x3", reduce, plain, 3, stride)
            self._add(block + "double_3x3_reduce", channels, double_reduce, 1)
            self._add(block + "double_3x3_1", double_reduce, double, 3)
            self._add(block + "double_3x3_2", double, double, 3, stride)
            if pool:
                self._add(block + "pool_proj", channels, pool, 1)

    def _add(self, name: str, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(channels, out, kernel, stride, kernel // 2))
        self.add_module(name + "_bn", nn.BatchNorm2d(out))

    def _apply_conv(self, name: str, x: Tensor) -> Tensor:
        return torch.relu(self.get_submodule(name + "_bn")(self.get_submodule(name)(x)))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        x = self._apply_conv("conv1_7x7_s2", images.flip(1))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        x = self._apply_conv("conv2_3x3", self._apply_conv("conv2_3x3_reduce", x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for name, (_, single, _, _, pool) in BLOCKS.items():
            x = self._block(f"inception_{name}_", x, bool(single), bool(pool), maximum=name == "5b")
        return x

    def _block(self, block: str, x: Tensor, single: bool, pool: bool, maximum: bool) -> Tensor:
        parts = [self._apply_conv(block + "1x1", x)] if single else []
        parts.append(self._apply_conv(block + "3x3", self._apply_conv(block + "3x3_reduce", x)))
        double = self._apply_conv(block + "double_3x3_1", self._apply_conv(block + "double_3x3_reduce", x))
        parts.append(self._apply_conv(block + "double_3x3_2", double))
        if pool:
            pooled = F.max_pool2d(x, 3, 1, 1, ceil_mode=True) if maximum else F.avg_pool2d(x, 3, 1, 1)
            parts.append(self._apply_conv(block + "pool_proj", pooled))
        else:
            parts.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
        return torch.cat(parts, 1)
