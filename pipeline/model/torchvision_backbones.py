"""Backbones of torchvision, without their classifiers, with the pooling that is asked for."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.config_model import TORCHVISION, ModelConfig
from pipeline.errors import UserError, did_you_mean, joined_lines
from pipeline.model.pooling import Pool
from pipeline.vision_libraries import torchvision

VIT_SIZE = 224  # of images that torchvision's ViTs are made for, unless told otherwise


def list_torchvision() -> list[str]:
    """Names of torchvision's classification networks."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build_torchvision(config: ModelConfig, size: int) -> nn.Module:
    """A network of torchvision with its classifier removed and, unless model.pooling is native, its pooling replaced.

    Raises:
        UserError: torchvision has no such network, it has no pooling to replace, or its weights cannot be downloaded.
    """
    name = config.backbone.removeprefix(TORCHVISION)
    if name not in list_torchvision():
        raise UserError(f"torchvision has no model {name!r}: {did_you_mean(name, list_torchvision())}")
    try:
        net = _create(name, config, size)
    except (OSError, RuntimeError) as error:
        if config.weights != "pretrained":
            raise UserError(f"backbone {config.backbone!r} cannot be built: {joined_lines(error)}") from error
        raise UserError(
            f"weights of {config.backbone!r} cannot be downloaded ({type(error).__name__}): without a connection, set "
            "model.weights to a file, or to none"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone {config.backbone!r} cannot be built: {joined_lines(error)}") from error
    _replace_classifier(net, config)
    for module in net.modules():  # as in timm; with a mask per rank, the result would depend on the number of ranks
        if isinstance(module, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth):
            module.p = 0.0
    return net


def _create(name: str, config: ModelConfig, size: int) -> nn.Module:
    download = config.weights == "pretrained"
    options: dict[str, Any] = dict(config.backbone_args)
    if name.startswith("vit_") and size != VIT_SIZE:
        net = torchvision.models.get_model(name, weights=None, image_size=size, **options)
        if download:
            state = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
            net.load_state_dict(
                torchvision.models.vision_transformer.interpolate_embeddings(size, net.patch_size, state)
            )
        return net
    if name.startswith("maxvit") and size != VIT_SIZE and not download:
        options.setdefault("input_size", (size, size))
    inception = name in ("googlenet", "inception_v3")
    if inception and not download:
        options |= {"aux_logits": True, "init_weights": False, "transform_input": True}
    net = torchvision.models.get_model(name, weights="DEFAULT" if download else None, **options)
    if inception:
        net.aux_logits = False
        net.aux1 = None
        net.aux2 = None
        net.AuxLogits = None
    return net


def _replace_classifier(net: nn.Module, config: ModelConfig) -> None:
    native = config.pooling == "native"
    classifier = getattr(net, "classifier", None)
    pools = isinstance(classifier, nn.Module) and any(isinstance(m, nn.AdaptiveAvgPool2d) for m in classifier.modules())
    if pools:  # SqueezeNet, MaxViT: the pooling is a part of the classifier
        net.classifier = nn.Sequential(Pool("avg" if native else config.pooling), nn.Flatten())
        return
    if not native:
        if not isinstance(getattr(net, "avgpool", None), nn.Module):
            raise UserError(
                f"{config.backbone} has no pooling layer to replace: set model.pooling to native, or use timm's"
            )
        net.avgpool = Pool(config.pooling)
    for name in ("fc", "classifier", "heads", "head"):
        if isinstance(getattr(net, name, None), nn.Module):
            setattr(net, name, nn.Flatten() if native and name == "classifier" else nn.Identity())
            return
