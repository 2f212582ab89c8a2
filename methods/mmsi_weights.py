"""MMSI's options, and the weights of a batch's pairs as functions of similarities; the method is `methods/mmsi.py`."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor

from methods.base import MethodConfig
from methods.config import Length
from methods.mining import Memory, MiningRequirements
from methods.mmsi_losses import MARGINS, PAIR_LOSSES, Constants, Selection
from methods.optim import OptimizerConfig


class MmsiConfig(MethodConfig):
    name: Literal["mmsi"] = "mmsi"
    classes_per_batch: int = Field(16, ge=2, description="P: classes in a batch")
    samples_per_class: int = Field(5, ge=2, description="K: images of one class in a batch")
    embedding_dim: int = Field(512, ge=1, description="D: dimension of the embedding")
    loss: Literal["contrastive", "multi_similarity", "binomial", "lifted", "triplet"] = Field(
        "multi_similarity", description="the pair loss that is weighted"
    )
    margin: float | None = Field(
        None,
        description="margin of pair selection (contrastive: similarity above which a negative counts; none: the loss's own)",
    )
    alpha: float = Field(40.0, gt=0, description="α: scale of the negatives' similarities")
    beta: float = Field(2.0, gt=0, description="β: scale of the positives' similarities")
    base: float = Field(0.5, description="λ: similarity that is subtracted before scaling")
    meta: bool = Field(True, description="learn weights of pairs; false: the plain loss, every weight 1")
    meta_start: Length = Field(
        Length(value=0, unit="steps"),
        description="length of training with the plain loss first; the authors start from a trained network",
    )
    meta_classes: int = Field(10, ge=1, description="images of the meta batch, each of another class")
    meta_source: Literal["train", "holdout"] = Field(
        "train", description="meta images are drawn from all training images | from a share that is not trained on"
    )
    meta_share: float = Field(0.1, gt=0, lt=1, description="holdout: share of each class of two images or more")
    exclude_same_image: bool = Field(False, description="a meta image is not compared with its own entry")
    memory_per_class: int = Field(100, ge=1, description="entries of one class in the memory")
    memory_total: int | None = Field(None, ge=1, description="entries of all classes; none: any number")
    warmup_classes: int = Field(
        98, ge=1, description="classes in the memory (at most all) before which nothing is learnt"
    )
    weighting: Literal["similarity", "gradient"] = Field(
        "similarity",
        description="a weight multiplies its pair's similarity inside the loss | its pair's part of the loss's gradient",
    )
    norm_scope: Literal["all", "per_sign"] = Field(
        "all",
        description="scale weights so that the largest of all pairs is 1 | that of the positives and that of the negatives",
    )
    weight_floor: float = Field(
        0.0, ge=0, lt=1, description="smallest weight of a pair: weights w become floor + (1 - floor) w"
    )
    w_init: float = Field(0.0, ge=0, description="weight of every pair at which the virtual step is taken")
    optimizer: OptimizerConfig = OptimizerConfig(name="adam", lr=1e-7, weight_decay=5e-4)

    @property
    def is_class_balanced(self) -> bool:
        return False

    @property
    def constants(self) -> Constants:
        """The constants of the loss, with its default margin if none is given."""
        margin = self.margin if self.margin is not None else MARGINS[self.loss]
        return Constants(margin, self.alpha, self.beta, self.base)

    @property
    def requires_frozen_batch_norm(self) -> bool:
        return self.meta

    @property
    def mining(self) -> MiningRequirements | None:
        return MiningRequirements(per_class=self.memory_per_class, total=self.memory_total) if self.meta else None

    @model_validator(mode="after")
    def _check(self) -> MmsiConfig:
        if self.loss == "triplet" and self.norm_scope == "per_sign":
            raise ValueError("a triplet's weight has no sign: norm_scope per_sign is for losses of pairs")
        if self.loss == "triplet" and self.weighting == "gradient":
            raise ValueError("a triplet's weight is not one of a pair: weighting gradient is for losses of pairs")
        return self


def select_pairs(similarity: Float[Tensor, "n n"], labels: Int64[Tensor, " n"], config: MmsiConfig) -> Selection:
    """The pairs that the loss of a batch uses."""
    same_class = labels[:, None] == labels[None]
    self_pairs = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return PAIR_LOSSES[config.loss].select(similarity.detach(), same_class & ~self_pairs, ~same_class, config.constants)


def weighted_loss(
    similarity: Float[Tensor, "n n"], weights: Float[Tensor, "rows n"] | float, selection: Selection, config: MmsiConfig
) -> Float[Tensor, ""]:
    """The loss of a batch, a weight for each slot of the selection.

    With `weighting: gradient` the value is that of the plain loss, and its gradient Σ w g ∂s, where g = ∂L/∂s is the plain loss's.
    """
    loss = PAIR_LOSSES[config.loss]
    if config.weighting == "similarity" or isinstance(weights, float):
        return loss.value(similarity, weights, selection, config.constants) / len(similarity)
    s = similarity.detach().requires_grad_()
    with torch.enable_grad():
        plain = loss.value(s, 1.0, selection, config.constants) / len(s)
        (g,) = torch.autograd.grad(plain, s)
    weighted = (weights * g * similarity).sum()
    return plain.detach() + weighted - weighted.detach()


def meta_loss(
    embeddings: Float[Tensor, "v dim"],
    labels: Int64[Tensor, " v"],
    ids: Int64[Tensor, " v"],
    memory: Memory,
    config: MmsiConfig,
) -> Float[Tensor, ""]:
    """The loss of the meta batch against the memory's entries."""
    similarity = embeddings @ memory.features.to(embeddings.dtype).T
    same_class = labels[:, None] == memory.labels[None]
    positives = same_class & (ids[:, None] != memory.ids[None]) if config.exclude_same_image else same_class
    pair_loss, constants = PAIR_LOSSES[config.loss], config.constants
    return pair_loss.value(
        similarity, 1.0, pair_loss.meta(similarity.detach(), positives, ~same_class, constants), constants
    ) / len(labels)


def gradient_of_weights(
    similarity: Float[Tensor, "n n"],
    similarity_tangent: Float[Tensor, "n n"],
    selection: Selection,
    lr: float,
    config: MmsiConfig,
) -> Float[Tensor, "rows n"]:
    """u = -∂L_meta/∂w at w_init, from the derivative Ṡ of the similarities along the meta gradient."""
    s = similarity.detach().requires_grad_()
    w = torch.full(selection.slots.shape, config.w_init, dtype=s.dtype, device=s.device, requires_grad=True)
    with torch.enable_grad():
        (g,) = torch.autograd.grad(weighted_loss(s, w, selection, config), s, create_graph=True)
        (u,) = torch.autograd.grad((g * similarity_tangent).sum(), w)
    return torch.where(selection.slots, lr * u, 0)


def normalise_weights(
    u: Float[Tensor, "rows n"], selection: Selection, scope: Literal["all", "per_sign"] = "all"
) -> Float[Tensor, "rows n"]:
    """Weights in 0..1: the positive part over its maximum; all 0 where no u is positive."""
    positive_part = torch.where(selection.slots, u.clamp(min=0), 0)
    if scope == "per_sign":
        return sum(
            (torch.where(m, _over_maximum(positive_part * m), 0) for m in selection[:2]),
            torch.zeros_like(positive_part),
        )
    return _over_maximum(positive_part)


def raise_weights(weights: Float[Tensor, "rows n"], selection: Selection, floor: float) -> Float[Tensor, "rows n"]:
    """Weights of at least `floor`, the largest still 1; all 0 where they all are."""
    return torch.where(selection.slots & (weights > 0).any(), floor + (1 - floor) * weights, 0) if floor else weights


def _over_maximum(weights: Tensor) -> Tensor:
    if not weights.numel():
        return weights
    largest = weights.max()
    return torch.where(largest > 0, weights / torch.where(largest > 0, largest, 1), 0)
