"""Supervised contrastive loss (Khosla, Teterwak, Wang et al., NeurIPS 2020, arXiv 2004.11362).

Every image is classified among the others of the batch: those of its class share the probability.

    s_ij = z_i·z_j / τ,    p_ij = exp s_ij / Σ_{k≠i} exp s_ik
    L = mean over i of  -mean over the positives j of i of  log p_ij

Deviations: an image without a positive in the batch is left out of the mean; a batch without any has loss 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from methods.base import Context, Method, MethodConfig


class SupConConfig(MethodConfig):
    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0, description="τ; the paper's is 0.1")


class SupCon(Method):
    Config = SupConConfig

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        return supcon_loss(embeddings, labels, self.config.temperature)


def supcon_loss(
    embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], temperature: float
) -> Float[Tensor, ""]:
    """The loss of embeddings of length 1. Cost: O(batch²) in time and memory."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similarity = (embeddings @ embeddings.T / temperature).masked_fill(itself, -torch.inf)
    log_probability = similarity.log_softmax(1).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels[None]) & ~itself
    num_positives = positive.sum(1)
    per_image = -(log_probability * positive).sum(1) / num_positives.clamp(min=1)
    return per_image.sum() / (num_positives > 0).sum().clamp(min=1)
