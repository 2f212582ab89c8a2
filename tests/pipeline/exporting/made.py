"""Models that nobody trained, for exports."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.config import build_config
from pipeline.distributed.collectives import Ranks
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.model.network import EmbeddingConfig, build_network
from pipeline.testing.tiny import tiny_values


def made_model(changes: dict[str, Any] | None = None) -> EmbeddingModel:
    """The tiny network with random weights and statistics, in float32; `changes` of its recipe by dotted key."""
    values = tiny_values("/nowhere", "/nowhere/store", {"precision": "float32", **(changes or {})})
    config = build_config(values)
    device = torch.device("cpu")
    trunk, method = build_network(config, 9, device)
    generator = torch.Generator().manual_seed(0)
    for name, buffer in trunk.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    trunk.set_mode(False, Ranks())
    settings = EmbeddingConfig.read(config.model_dump(mode="json"), "made")
    weights = {"trunk.safetensors": "0" * 64, "method.safetensors": "1" * 64}
    return EmbeddingModel("made", settings, trunk, method.eval(), device, weights, 9)
