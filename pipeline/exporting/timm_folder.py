"""The trunk as a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: config.json and model.safetensors.

A timm model is a backbone: the method's head is not in it. Its pooling is the trunk's where timm has the same one (average or
maximum of a convolutional map, or the backbone's own), so that it gives the trunk's pooled features; else it gives the map or
the tokens before the pooling, which the model card says.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from methods import plugins
from pipeline.config_model import BN_INCEPTION, TORCHVISION
from pipeline.errors import UserError
from pipeline.exporting.onnx_files import quiet, root_cause
from pipeline.exporting.parity import made_images
from pipeline.inference.embedding_model import EmbeddingModel
from pipeline.model.trunk import Trunk
from pipeline.vision_libraries import timm

SAME = 1e-5  # of an element, relative to the largest


def check_timm_backbone(model: EmbeddingModel) -> None:
    """Raises UserError unless the backbone is one of timm's."""
    name = model.settings.model.backbone
    if name.startswith(TORCHVISION) or name == BN_INCEPTION or plugins.is_import_string(name):
        raise UserError(
            f"--format timm is for backbones of timm, this model's is {name!r}: use --format safetensors, onnx or torch_export"
        )


def write_timm(model: EmbeddingModel, folder: Path) -> tuple[bool, float]:
    """Writes the two files.

    Returns:
        Whether the timm model gives the trunk's pooled features, and the largest difference of what it gives, once read back,
        to what the trunk computes, relative to the largest value.

    Raises:
        UserError: The backbone is not timm's, or timm cannot describe it.
    """
    check_timm_backbone(model)
    settings = model.settings
    trunk = copy.deepcopy(model.trunk).to("cpu", torch.float32).eval()
    trunk.folding = None
    net = trunk.backbone.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    transforms = model.transforms
    size, resize = transforms.size, transforms.resize or transforms.size
    inputs = trunk.normalise(made_images(2, size, size))
    with torch.no_grad():
        features, unpooled = trunk(made_images(2, size, size)), net(inputs)
    pooled = settings.model.pooling == "native" or _pool(net, settings.model.pooling, trunk, inputs, features)
    pixels = {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "crop_pct": 1.0 if transforms.squash else size / resize,
        "crop_mode": "squash" if transforms.squash else "center",
        "mean": trunk.mean.flatten().tolist(),
        "std": trunk.std.flatten().tolist(),
    }
    arguments = {**settings.model.backbone_args, **({} if pooled else {"global_pool": ""})}
    try:
        with quiet():
            described = {"pretrained_cfg": pixels}
            timm.models.save_for_hf(net, str(folder), described, model_args=arguments, safe_serialization=True)
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # whatever timm raises of a model that it does not know how to describe
        raise UserError(
            f"timm cannot describe {settings.model.backbone} ({root_cause(error)}): use --format safetensors, onnx or torch_export"
        ) from error
    return pooled, _difference(loaded, inputs, features if pooled else unpooled)


def _pool(net: nn.Module, pooling: str, trunk: Trunk, inputs: Tensor, features: Tensor) -> bool:
    """Gives the backbone timm's own pooling, if it computes what the trunk's does; else leaves it as it is."""
    if pooling not in ("avg", "max") or trunk.pool is None or trunk.pool.layout.axes != "NCHW":
        return False
    trial: Any = copy.deepcopy(net)
    try:
        trial.reset_classifier(0, pooling)
    except (AssertionError, TypeError, ValueError, RuntimeError):  # a backbone without this pooling
        return False
    same = _difference(trial, inputs, features) <= SAME
    if same:
        own: Any = net
        own.reset_classifier(0, pooling)
    return same


@torch.no_grad()
def _difference(net: nn.Module, inputs: Tensor, expected: Tensor) -> float:
    """The largest difference of a network's output to what is expected, relative to the largest of this."""
    got: Tensor = net(inputs)
    if got.shape != expected.shape:
        return math.inf
    return float((got - expected).abs().max() / expected.abs().max())
