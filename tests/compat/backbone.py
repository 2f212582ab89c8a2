"""A network of 1,432 parameters, so that the recorded checkpoints are small; timm knows it as `compat_tiny`."""

from __future__ import annotations

from typing import Any

from timm.layers import BatchNormAct2d
from timm.models import register_model
from torch import nn


class CompatTiny(nn.Sequential):
    """[B, 3, S, S] to [B, 16, S/4, S/4]: two convolutions with batch normalisation and ReLU."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            BatchNormAct2d(8),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            BatchNormAct2d(16),
        )
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@register_model
def compat_tiny(pretrained: bool = False, **_: Any) -> nn.Module:
    assert not pretrained
    return CompatTiny()
