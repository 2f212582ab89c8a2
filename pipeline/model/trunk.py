"""The trunk: a backbone, its pooling, and the mode of its batch normalisation.

uint8 [B, 3, S, S] -> normalise on the device -> backbone -> pooled features [B, F]
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError, joined_lines
from pipeline.model.backbones import build_backbone
from pipeline.model.batch_norm import SyncBatchNorm2d, SyncBatchNormAct2d
from pipeline.model.bn_folding import Folding
from pipeline.model.cached_gradients import in_parts
from pipeline.model.pooling import Pool, layout_of
from pipeline.model.timm_backbones import patch_side
from pipeline.vision_libraries import timm


class Trunk(nn.Module):
    """Backbone and pooling; the part that DDP wraps.

    Attributes:
        features: Width F of the pooled features.
        weights_note: One line about the weights that were loaded from a file, or "".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.config = config
        made = build_backbone(config, size)
        self.backbone = made.net
        self.weights_note = made.note
        self.register_buffer("mean", torch.tensor(config.mean or made.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std or made.std).view(3, 1, 1), persistent=False)
        if config.channels_last:
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        self.folding: Folding | None = None
        output = self._output(size)
        shape = tuple(output.shape)
        self.pool: Pool | None = None
        if not made.pools:
            self.pool = Pool(config.pooling, layout_of(self.backbone, config.backbone, shape, made.widths))
        elif len(shape) != 2 or (made.widths and shape[1] not in made.widths):
            raise UserError(
                f"{config.backbone} gives {shape[1:]} for an image of {size}×{size}, expected pooled features"
                f"{f' of width {min(made.widths)}' if made.widths else ''}: set model.pooling to avg"
            )
        self.features = int(self._pooled(output).shape[1])

    def _output(self, size: int) -> Tensor:
        """The backbone's output for one black image; finds the batch normalisations that can be folded."""
        self.eval()
        pixels = self.normalise(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        try:
            self.folding = Folding(self.backbone, pixels)
            with torch.no_grad():
                output = self.backbone(pixels)
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            usual = getattr(self.backbone, "pretrained_cfg", {}).get("input_size", (0,))[-1]
            hint = f"; data.transforms.size: {usual} is its usual size" if usual not in (0, size) else ""
            raise UserError(
                f"{self.config.backbone} cannot take images of {size}×{size}: {joined_lines(error)}{hint}"
            ) from error
        if not isinstance(output, Tensor):
            raise UserError(
                f"{self.config.backbone} gives a {type(output).__name__}, expected a tensor of maps or features"
            )
        return output

    def check_evaluation(self, size: int) -> None:
        """Raises UserError unless the network, built for the size of training, takes images of this one."""
        side = patch_side(self.backbone)
        if side and size % side:
            near = size // side * side
            raise UserError(
                f"{self.config.backbone} cuts images into patches of {side}×{side} pixels, those of evaluation have {size}: choose "
                f"data.transforms.evaluation_scale so that they have {near} or {near + side}, or 1"
            )
        self.eval()
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            fixed = getattr(self.backbone, "dynamic_img_size", True) is False
            other = ", or model.backbone_args: {dynamic_img_size: true}" if fixed else ""
            raise UserError(
                f"{self.config.backbone} cannot take images of {size}×{size} in evaluation: {joined_lines(error).rstrip('.')}. "
                f"Set data.transforms.evaluation_scale to 1{other}"
            ) from error

    def compile_backbone(self) -> None:
        """Has the backbone compiled by torch.compile at its first passes; names of weights stay."""
        self.folding = None  # it changes layers in each pass
        self.backbone.compile()

    def normalise(self, pixels: Tensor) -> Tensor:
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def forward(
        self, pixels: UInt8[Tensor, "batch 3 size size"], images_per_pass: int | None = None
    ) -> Float[Tensor, "batch features"]:
        """Pooled features.

        Args:
            pixels: Images.
            images_per_pass: The batch is passed in parts of so many images, for its gradients too (see `in_parts`); None: whole.
        """
        return in_parts(self._features, pixels, images_per_pass)

    def _features(self, pixels: Tensor) -> Tensor:
        with self.folding() if self.folding else nullcontext():
            maps = self.backbone(self.normalise(pixels))
        return self._pooled(maps)

    def _pooled(self, maps: Tensor) -> Tensor:
        return (maps if self.pool is None else self.pool(maps)).flatten(1)

    def set_mode(self, training: bool, ranks: Ranks) -> None:
        """Training or evaluation mode, with batch normalisation as configured."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.config.batch_norm == "frozen":
                module.eval()
            if isinstance(module, SyncBatchNorm2d):
                module.ranks = ranks


def build_trunk(config: ModelConfig, size: int) -> Trunk:
    """Makes the trunk and loads its weights.

    Args:
        config: The model section of the config.
        size: Side of the images in pixels; the network is run once on an image of this size to find its width.

    Raises:
        UserError: The backbone is unknown, weights are missing or do not fit, or it cannot take this size or pooling.
    """
    trunk = Trunk(config, size)
    if config.batch_norm == "sync":
        for module in trunk.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d  # keeps parameters and their names
            elif type(module) is timm.layers.BatchNormAct2d:
                module.__class__ = SyncBatchNormAct2d  # type: ignore[assignment]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm2d):
                raise UserError(
                    f"batch_norm: sync does not know {type(module).__name__} of {config.backbone}: use frozen or local"
                )
    return trunk
