"""Methods that tell what a method's parts are worth, for the experiments."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from methods.mmsi import Mmsi, MmsiConfig
from methods.mmsi_losses import Selection


class ShuffledMmsiConfig(MmsiConfig):
    name: str = "benchmarks.controls:ShuffledMmsi"  # type: ignore[assignment]


class ShuffledMmsi(Mmsi):
    """MMSI whose weights are exchanged at random among the pairs of a step: as large, and of no meaning."""

    Config = ShuffledMmsiConfig

    def __init__(self, config: MmsiConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.random = torch.Generator().manual_seed(0)

    def pair_weights(self, u: Float[Tensor, "rows n"], selection: Selection) -> Float[Tensor, "rows n"]:
        weights = super().pair_weights(u, selection)
        for mask in selection[:2]:
            of_sign = weights[mask]
            weights[mask] = of_sign[torch.randperm(len(of_sign), generator=self.random).to(of_sign.device)]
        return weights
