"""Backbones of timm: found by name, made for the size of the images, without their classifiers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import UserError, did_you_mean, joined_lines, one_line
from pipeline.vision_libraries import timm

LOCAL = "local-dir:"
HUB = ("hf-hub:", "hf_hub:", LOCAL)  # prefixes of names that timm looks up elsewhere


def build_timm(config: ModelConfig, size: int) -> nn.Module:
    """A network of timm with its classifier removed and, unless model.pooling is native, its pooling.

    Networks that are made for one size of images (ViT, Swin) are made for `size`; timm fits pretrained position embeddings.

    Raises:
        UserError: timm has no such network or no weights of it, they cannot be downloaded, or it cannot take this size.
    """
    check_timm(config.backbone)
    may_download = config.weights == "pretrained" or config.backbone.startswith(HUB)
    with _offline_without_connection() if may_download else contextlib.nullcontext():
        net = _create(config, size)
    side = patch_side(net)
    if side and size % side:
        raise UserError(
            f"{config.backbone} cuts images into patches of {side}×{side} pixels, data.transforms.size is {size}: "
            f"set it to {size // side * side or side} or {(size // side + 1) * side}"
        )
    reset: Any = getattr(net, "reset_classifier", None)  # a model that the user registered need not have it
    if config.pooling != "native" and reset is not None:
        try:
            reset(0, "")
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the pooling of {config.backbone} cannot be replaced ({joined_lines(error)}): set model.pooling to native"
            ) from error
        head: Any = getattr(net, "head", None)
        if getattr(net, "output_fmt", "") == "NHWC" and isinstance(getattr(head, "pre_logits", None), nn.Module):
            head.pre_logits = nn.Identity()  # an MLP of the classifier, made for pooled features
    return net


def widths(net: nn.Module) -> set[int]:
    """Numbers of channels that the network's last map may have, as timm declares them."""
    declared = (getattr(net, "num_features", None), getattr(net, "head_hidden_size", None))
    return {width for width in declared if isinstance(width, int)}


def patch_side(net: nn.Module) -> int | None:
    """Side of the patches that the network cuts an image into; None: it does not."""
    side = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    side = side[0] if isinstance(side, tuple) else side
    return side if isinstance(side, int) else None


def check_timm(name: str) -> None:
    """Raises UserError, naming the most similar model or weights, unless timm has them."""
    if name.startswith(HUB):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"backbone {name!r} is unknown: {did_you_mean(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(f"backbone {name!r}: {architecture} has no weights {tag!r}, {did_you_mean(tag, tags)}")


def _create(config: ModelConfig, size: int) -> nn.Module:
    name, download = config.backbone, config.weights == "pretrained"
    options = dict(config.backbone_args)
    try:
        usual_size, has_weights = _description(name)
        if download and not has_weights:
            raise UserError(f"timm has no pretrained weights of {name!r}: set model.weights to a file, or to none")
        if config.drop_path:
            options.setdefault("drop_path_rate", config.drop_path)
        if usual_size not in (None, size):
            options.setdefault("img_size", size)
        return timm.create_model(name, pretrained=download, num_classes=0, **options)
    except UserError:
        raise
    except Exception as error:  # whatever timm, the hub's client or the network raises
        is_input = isinstance(error, (AssertionError, TypeError, ValueError))
        if name.startswith(HUB) or (download and not is_input):
            raise UserError(_cannot_be_had(name, error)) from error
        sized = f" for images of {size}×{size}" if "img_size" in options else ""
        raise UserError(f"backbone {name!r} cannot be built{sized}: {joined_lines(error)}") from error


@contextlib.contextmanager
def _offline_without_connection() -> Iterator[None]:
    """The hub's client looks into its cache alone where the hub's name is not known: it would try for a minute."""
    before = constants.HF_HUB_OFFLINE
    if not before and not any(os.environ.get(n) for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cannot_be_had(name: str, error: Exception) -> str:
    if name.startswith(LOCAL):
        return f"backbone {name!r} cannot be read ({one_line(error)}): expected a folder with config.json and weights"
    remedy = "set model.weights to a file, or to none"
    if name.startswith(HUB):
        remedy = "set model.backbone to the name of a timm model, and model.weights to a file or to none"
    return f"{name!r} cannot be downloaded ({type(error).__name__}): without a connection, {remedy}"


def _description(name: str) -> tuple[int | None, bool]:
    """The one size of images that a network is made for (None: any), and whether it has pretrained weights."""
    if not name.startswith(HUB):
        known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        if known is None:
            return None, False
        return (known.input_size[-1] if known.fixed_input_size else None), bool(known.has_weights)
    location = name.partition(":")[2]
    hub = timm.models._hub
    read = hub.load_model_config_from_path if name.startswith(LOCAL) else hub.load_model_config_from_hf
    described, _, arguments = read(location)
    fixed = described.get("fixed_input_size") or "img_size" in (arguments or {})
    return (described["input_size"][-1] if fixed else None), True
