"""The network as it is deployed: pixels or images in, embeddings out, one module in float32 on the CPU."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pipeline.exporting.preprocessing import Preprocessing
from pipeline.inference.embedding_model import EmbeddingModel


class DeployedNetwork(nn.Module):
    """Trunk and the method's `embed`, with the preprocessing before them if it is given.

    The weights are a float32 copy; of a run in bf16, whose trunk computes in bfloat16, the float32 network.

    Args:
        model: The trained model.
        preprocessing: Makes pixels of images.
    """

    def __init__(self, model: EmbeddingModel, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.trunk = copy.deepcopy(model.trunk).to("cpu", torch.float32)
        self.trunk.folding = None  # runtimes fold batch normalisations into convolutions themselves
        self.method = copy.deepcopy(model.method).to("cpu", torch.float32)
        self.eval()

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        pixels = images if self.preprocessing is None else self.preprocessing(images)
        return self.method.embed(self.trunk(pixels))


def refines(model: EmbeddingModel) -> bool:
    """True if an evaluation changes embeddings by looking at all of them together, which no single image allows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, model.dim, generator=generator))
    rows = rows.to(next(model.trunk.parameters()))
    with torch.no_grad():
        refined: Tensor = model.method.refine_embeddings(rows)
    return refined.shape != rows.shape or not torch.equal(refined, rows)
