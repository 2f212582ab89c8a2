"""The head: from the trunk's pooled features to embeddings of length 1."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from methods.config import BaseConfig


class HeadConfig(BaseConfig):
    """Layers between pooled features and embedding; by default one linear layer."""

    init: Literal["uniform", "orthogonal"] = Field(
        "uniform", description="start of the last layer: PyTorch's default | orthogonal weights and zero bias"
    )
    layer_norm: bool = Field(False, description="layer normalisation of the pooled features, before all layers")
    hidden: tuple[PositiveInt, ...] = Field((), description="widths of layers before the last one, each with a GELU")


class Head(nn.Module):
    """Linear layer and L2 norm: pooled features [B, F] to embeddings [B, D] of length 1; with more layers if they are asked for.

    Args:
        features: Width F of the pooled features.
        dim: Dimension D of the embedding.
        config: What comes before the linear layer, and how it starts.
    """

    def __init__(self, features: int, dim: int, config: HeadConfig | None = None) -> None:
        super().__init__()
        config = config or HeadConfig()
        self.norm = nn.LayerNorm(features) if config.layer_norm else None
        widths = (features, *config.hidden)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, config.hidden, strict=False))
        self.linear = nn.Linear(widths[-1], dim)
        if config.init == "orthogonal":
            nn.init.orthogonal_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def project(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        """The embeddings before they are brought to length 1."""
        x = features if self.norm is None else self.norm(features)
        for layer in self.hidden:
            x = nn.functional.gelu(layer(x))
        return self.linear(x)

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return nn.functional.normalize(self.project(features))
