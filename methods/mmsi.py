"""MMSI: meta-mining with semi-global information (Jiang et al., IEEE TNNLS 35(4), 2024, doi 10.1109/TNNLS.2022.3202571).

Every mined pair gets a weight, anew in each step: the pairs whose gradient also helps other images, against a memory of
the classes seen so far, count; the others do not. There is no weighting network and nothing about weights is learnt.

    E = f(x; θ),  S = E Eᵀ;  the memory G takes E in (per class first in, first out)
    θ̂(w) = θ - lr ∂L(S, w)/∂θ       a virtual step on the weighted loss, from w = w_init
    u = -∂/∂w L_meta(f(x_meta; θ̂) Gᵀ)
    w* = max(u, 0) / max(u),          a constant in the real step:  θ ← Adam(∂L(S, w*)/∂θ)

No second-order gradient is taken. θ̂ depends on w only through the gradient it subtracts, so with the direction
v = ∂L_meta/∂θ at θ̂, the derivative Ė of the embeddings along v (one forward-mode pass) and Ṡ = Ė Eᵀ + E Ėᵀ

    u = lr · d/dw ⟨∂L(S, w)/∂S, Ṡ⟩

exactly, for any loss on similarities: one small backward pass on the meta batch and one derivative on n × n matrices.
With w_init = 0 the virtual gradient is zero, θ̂ = θ, and lr cancels in w*. `loss` is one of

    contrastive        1/n Σ_i [Σ_P (1 - s) w + Σ_N s w]                                  N: s > margin
    multi_similarity   1/n Σ_i [2/β log(1 + Σ_P e^{-β(ws - λ)}) + 2/α log(1 + Σ_N e^{α(ws - λ)})]
    binomial           1/n Σ_i [mean_P 2/β log(1 + e^{-β(ws - λ)}) + mean_N 2/α log(1 + e^{α(ws - λ)})]
    lifted             1/n Σ_i [2/β log Σ_P e^{-βws} + 2/α log Σ_N e^{αws}]
    triplet            1/n Σ_(i,p,q) max(0, w (s_iq - s_ip) + margin)                     active triplets

Of multi_similarity, lifted (and binomial, if it is given a margin) the pairs are mined: a negative counts if it is nearer
than the farthest positive plus margin, a positive if it is farther than the nearest negative minus margin; an anchor
without either is left out. The meta loss is the same loss of the meta batch against the memory, every weight 1, unmined.

Released by the authors: contrastive and multi_similarity; the others follow from the same scheme. Beside the paper's name
for things: their meta batch comes from the training images themselves (`meta_source: train`), not from a validation set.
With multi_similarity and w_init = 0 a negative's weight carries the factor e^{-αλ} (2e-9), so that the step is one on the
positives alone: that is what the authors' program does, and what the defaults do.

Deviations: `norm_scope: per_sign` and `w_init` above 0 are ours. Self-pairs are left out by position (theirs: by s < 1);
masks are found once a step (theirs: twice); a step without any positive u is skipped and counted (theirs: weights become
NaN); contrastive is 1 - s (theirs, by a slip, -(1 + s): other values, the same gradients). The meta batch follows from
(seed, step); theirs pauses while the memory fills. `meta_start` trains on the plain loss first, within the run. The virtual step has one rate for trunk and head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from methods.base import Batch, Context, Gradient, Memory, Method, MethodConfig, MiningNeeds
from methods.optim import Length, OptimizerConfig
from methods.plans import Plan, each_class_once, side_by_side

_MARGINS = {"contrastive": 0.8, "multi_similarity": 0.05, "binomial": None, "lifted": 0.1, "triplet": 0.1}


class MmsiConfig(MethodConfig):
    name: Literal["mmsi"] = "mmsi"
    classes_per_batch: int = Field(16, ge=2, description="P: classes in a batch")
    samples_per_class: int = Field(5, ge=2, description="K: images of one class in a batch")
    embedding_dim: int = Field(512, ge=1, description="D")
    loss: Literal["contrastive", "multi_similarity", "binomial", "lifted", "triplet"] = "multi_similarity"
    margin: float | None = Field(
        None, description="of mining (contrastive: similarity above which a negative counts; none: the loss's own)"
    )
    alpha: float = Field(40.0, gt=0, description="α: of negatives")
    beta: float = Field(2.0, gt=0, description="β: of positives")
    base: float = Field(0.5, description="λ: similarity about which they turn")
    meta: bool = Field(True, description="off: the plain loss, every weight 1")
    meta_start: Length = Field(
        Length(value=0, unit="steps"),
        description="the plain loss until then, as the authors start from a trained network",
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
    norm_scope: Literal["all", "per_sign"] = Field(
        "all", description="largest weight is 1: of all pairs | of the positives, and of the negatives"
    )
    w_init: float = Field(0.0, ge=0, description="weights about which the virtual step is taken")
    optimizer: OptimizerConfig = OptimizerConfig(name="adam", lr=1e-7, weight_decay=5e-4)

    @property
    def mined(self) -> float | None:
        """The margin in force; none (binomial only): no pair is mined away."""
        return self.margin if self.margin is not None else _MARGINS[self.loss]

    @property
    def freezes(self) -> bool:
        return self.meta

    @property
    def mining(self) -> MiningNeeds | None:
        return MiningNeeds(per_class=self.memory_per_class, total=self.memory_total) if self.meta else None

    @model_validator(mode="after")
    def _check(self) -> MmsiConfig:
        if self.loss == "triplet" and self.norm_scope == "per_sign":
            raise ValueError("a triplet's weight has no sign: norm_scope per_sign is for losses of pairs")
        return self


class Selection(NamedTuple):
    """Which pairs a loss looks at.

    Attributes:
        positives: [anchor, other].
        negatives: [anchor, other]; of a triplet loss [positive pair, in the order of the matrix; other].
        slots: what has a weight; shape of `negatives`.
    """

    positives: Bool[Tensor, "anchors others"]
    negatives: Bool[Tensor, "rows others"]
    slots: Bool[Tensor, "rows others"]


class Base(NamedTuple):
    """A loss on similarities.

    Attributes:
        select: (similarities, positive pairs, negative pairs, config) to what is mined of them.
        value: (similarities, weights, selection, config) to the sum over the anchors; weights 1.0 make it the plain loss.
        meta: as `select`, for the meta batch against the memory.
    """

    select: Callable[[Tensor, Tensor, Tensor, MmsiConfig], Selection]
    value: Callable[[Tensor, Tensor | float, Selection, MmsiConfig], Tensor]
    meta: Callable[[Tensor, Tensor, Tensor, MmsiConfig], Selection]


# ---- the losses ------------------------------------------------------------------------------------------------------


def _margin(c: MmsiConfig) -> float:
    assert c.mined is not None
    return c.mined


def _pairs(positives: Tensor, negatives: Tensor) -> Selection:
    return Selection(positives, negatives, positives | negatives)


def _both(positives: Tensor, negatives: Tensor) -> Selection:
    """Without anchors that lack either."""
    complete = positives.any(1, keepdim=True) & negatives.any(1, keepdim=True)
    return _pairs(positives & complete, negatives & complete)


def _mine(similarity: Tensor, positives: Tensor, negatives: Tensor, c: MmsiConfig) -> Selection:
    """Multi-similarity mining (Wang et al., CVPR 2019)."""
    if c.mined is None:
        return _pairs(positives, negatives)
    farthest = similarity.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
    nearest = similarity.masked_fill(~negatives, -torch.inf).amax(1, keepdim=True)
    return _both(positives & (nearest - similarity + c.mined > 0), negatives & (similarity + c.mined - farthest > 0))


def _above(similarity: Tensor, positives: Tensor, negatives: Tensor, c: MmsiConfig) -> Selection:
    return _pairs(positives, negatives & (similarity > _margin(c)))


def _active(similarity: Tensor, positives: Tensor, negatives: Tensor, c: MmsiConfig) -> Selection:
    anchor, positive = positives.nonzero(as_tuple=True)
    gap = similarity[anchor] - similarity[anchor, positive][:, None]
    active = negatives[anchor] & (gap + _margin(c) > 0)
    return Selection(positives, active, active)


def _contrastive(s: Tensor, w: Tensor | float, chosen: Selection, c: MmsiConfig) -> Tensor:
    return torch.where(chosen.positives, (1 - s) * w, 0).sum() + torch.where(chosen.negatives, s * w, 0).sum()


def _multi_similarity(s: Tensor, w: Tensor | float, chosen: Selection, c: MmsiConfig) -> Tensor:
    near = _log_sum(-c.beta * (w * s - c.base), chosen.positives, one=True)
    return (
        2 / c.beta * near.sum() + 2 / c.alpha * _log_sum(c.alpha * (w * s - c.base), chosen.negatives, one=True).sum()
    )


def _binomial(s: Tensor, w: Tensor | float, chosen: Selection, c: MmsiConfig) -> Tensor:
    near = _mean(F.softplus(-c.beta * (w * s - c.base)), chosen.positives)
    return 2 / c.beta * near.sum() + 2 / c.alpha * _mean(F.softplus(c.alpha * (w * s - c.base)), chosen.negatives).sum()


def _lifted(s: Tensor, w: Tensor | float, chosen: Selection, c: MmsiConfig) -> Tensor:
    near = _log_sum(-c.beta * w * s, chosen.positives, one=False)
    return 2 / c.beta * near.sum() + 2 / c.alpha * _log_sum(c.alpha * w * s, chosen.negatives, one=False).sum()


def _triplet(s: Tensor, w: Tensor | float, chosen: Selection, c: MmsiConfig) -> Tensor:
    anchor, positive = chosen.positives.nonzero(as_tuple=True)
    gap = s[anchor] - s[anchor, positive][:, None]
    return torch.where(chosen.negatives, F.relu(w * gap + _margin(c)), 0).sum()


def _log_sum(exponents: Tensor, mask: Tensor, one: bool) -> Tensor:
    """log(Σ exp) over the masked entries of each row that has any, with a 1 in the sum or without."""
    rows = mask.any(1)
    kept = exponents[rows].masked_fill(~mask[rows], -torch.inf)
    return torch.logsumexp(F.pad(kept, (0, 1), value=0.0) if one else kept, 1)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)


BASES: dict[str, Base] = {
    "contrastive": Base(_above, _contrastive, _above),
    "multi_similarity": Base(_mine, _multi_similarity, lambda s, p, n, c: _both(p, n)),
    "binomial": Base(_mine, _binomial, lambda s, p, n, c: _pairs(p, n)),
    "lifted": Base(_mine, _lifted, lambda s, p, n, c: _both(p, n)),
    "triplet": Base(_active, _triplet, _active),
}


# ---- the weights -----------------------------------------------------------------------------------------------------


def select(similarity: Float[Tensor, "n n"], labels: Int64[Tensor, " n"], config: MmsiConfig) -> Selection:
    """What the loss of a batch looks at."""
    same = labels[:, None] == labels[None]
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return BASES[config.loss].select(similarity.detach(), same & ~own, ~same, config)


def loss(
    similarity: Float[Tensor, "n n"], weights: Float[Tensor, "rows n"] | float, chosen: Selection, config: MmsiConfig
) -> Float[Tensor, ""]:
    """The loss of a batch, a weight for each slot of the selection."""
    return BASES[config.loss].value(similarity, weights, chosen, config) / len(similarity)


def meta_loss(
    embeddings: Float[Tensor, "v dim"],
    labels: Int64[Tensor, " v"],
    ids: Int64[Tensor, " v"],
    memory: Memory,
    config: MmsiConfig,
) -> Float[Tensor, ""]:
    """The loss of the meta batch against the memory's entries."""
    similarity = embeddings @ memory.features.to(embeddings.dtype).T
    same = labels[:, None] == memory.labels[None]
    positives = same & (ids[:, None] != memory.ids[None]) if config.exclude_same_image else same
    base = BASES[config.loss]
    return base.value(similarity, 1.0, base.meta(similarity.detach(), positives, ~same, config), config) / len(labels)


def gradient_of_weights(
    similarity: Float[Tensor, "n n"], along: Float[Tensor, "n n"], chosen: Selection, lr: float, config: MmsiConfig
) -> Float[Tensor, "rows n"]:
    """u = -∂L_meta/∂w at w_init, from the derivative Ṡ of the similarities along the meta gradient."""
    s = similarity.detach().requires_grad_()
    w = torch.full(chosen.slots.shape, config.w_init, dtype=s.dtype, device=s.device, requires_grad=True)
    with torch.enable_grad():
        (g,) = torch.autograd.grad(loss(s, w, chosen, config), s, create_graph=True)
        (u,) = torch.autograd.grad((g * along).sum(), w)
    return torch.where(chosen.slots, lr * u, 0)


def normalise(
    u: Float[Tensor, "rows n"], chosen: Selection, scope: Literal["all", "per_sign"] = "all"
) -> Float[Tensor, "rows n"]:
    """Weights in 0..1: the positive part over its maximum; all 0 where no u is positive."""
    raw = torch.where(chosen.slots, u.clamp(min=0), 0)
    if scope == "per_sign":
        return sum((torch.where(m, _over_maximum(raw * m), 0) for m in chosen[:2]), torch.zeros_like(raw))
    return _over_maximum(raw)


def _over_maximum(raw: Tensor) -> Tensor:
    return raw / raw.max() if raw.numel() and bool(raw.max() > 0) else torch.zeros_like(raw)


# ---- the method ------------------------------------------------------------------------------------------------------


class Mmsi(Method):
    Config = MmsiConfig
    skipped: Tensor

    def __init__(self, config: MmsiConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.warmup = min(config.warmup_classes, num_classes)
        # steps without an update: memory too small, meta loss zero, no weight above zero
        self.register_buffer("skipped", torch.zeros(3, dtype=torch.int64))

    def plan(self, epoch: int, context: Context) -> Plan:
        """Batches of P classes × K images, each class once an epoch, each with a meta batch (roles `train` and `meta`)."""
        c, labels, seed = self.config, context.labels, context.seed
        everything = np.arange(len(labels))
        held = _held_out(labels, c.meta_share, seed) if c.meta and c.meta_source == "holdout" else everything[:0]
        trained = np.setdiff1d(everything, held)
        plan = each_class_once(labels[trained], c.classes_per_batch, c.samples_per_class, seed, epoch)
        plan = Plan(trained[plan.ids])
        if not c.meta:
            return plan
        source = held if c.meta_source == "holdout" else everything
        return side_by_side({"train": plan, "meta": self._meta_batches(labels, source, seed, epoch, len(plan))})

    def _meta_batches(self, labels: np.ndarray, source: np.ndarray, seed: int, epoch: int, steps: int) -> Plan:
        """The epoch's part of an endless row of passes over all classes."""
        each = len(np.unique(labels[source])) // self.config.meta_classes  # steps of a pass
        if each == 0:
            raise ValueError(
                f"meta_classes is {self.config.meta_classes}, but meta images have {len(np.unique(labels[source]))} classes: lower it"
            )
        first, last = epoch * steps // each, ((epoch + 1) * steps - 1) // each
        passes = [
            each_class_once(labels[source], self.config.meta_classes, 1, seed + 1, p).ids
            for p in range(first, last + 1)
        ]
        start = epoch * steps - first * each
        return Plan(source[np.concatenate(passes)[start : start + steps]])

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        c = self.config
        if not c.meta:
            return super().training_step(batch, context)
        assert context.mining is not None and context.mining.memory is not None
        role = batch.columns["role"]
        train, meta = (torch.from_numpy(role == name).to(batch.ids.device) for name in ("train", "meta"))
        labels, memory = batch.labels[train], context.mining.memory
        plain = c.meta_start.share(context.clock) < 1
        known = len(memory.classes) + len(set(labels.tolist()).difference(memory.classes))
        with torch.set_grad_enabled(plain or known >= self.warmup):
            embeddings = self.embed(context.encode("train"))
        context.mining.put(batch.ids[train], embeddings.detach(), labels)
        similarity = embeddings @ embeddings.T
        chosen = select(similarity, labels, c)
        if plain:
            value = loss(similarity, 1.0, chosen, c)
            context.backward(value)
            context.step("main")
            return self._logs(value, None, None, chosen)
        if known < self.warmup:
            self.skipped[0] += 1
            return self._logs(loss(similarity, 1.0, chosen, c), None, None, chosen)

        lr = c.optimizer.lr * c.optimizer.schedule.factor(context.clock, context.length)
        gradient = self._meta_gradient(batch, chosen, train, meta, lr, context, memory)
        weights = torch.zeros(chosen.slots.shape, dtype=similarity.dtype, device=similarity.device)
        if gradient.value != 0 and bool(chosen.slots.any()):
            moving = self._along(gradient, context).to(similarity.dtype)
            product = moving @ embeddings.detach().T
            u = gradient_of_weights(similarity, product + product.T, chosen, lr, c)
            weights = normalise(u, chosen, c.norm_scope)
        value = loss(similarity, weights, chosen, c)
        if bool((weights > 0).any()):
            context.backward(value)
            context.step("main")
        else:
            self.skipped[1 if gradient.value == 0 else 2] += 1
            context.backward(0 * embeddings.sum())  # what DDP has begun has to be ended
        return self._logs(value, gradient.value, weights, chosen)

    def _meta_gradient(
        self, batch: Batch, chosen: Selection, train: Tensor, meta: Tensor, lr: float, context: Context, memory: Memory
    ) -> Gradient:
        """Of the meta loss by the parameters of trunk and head, at θ̂: where a virtual step on the batch leads."""
        head: dict[str, Tensor] = dict(self.head.named_parameters())
        shift: Mapping[str, Tensor] | None = None
        if self.config.w_init:  # about 0 the virtual gradient is 0

            def virtual(features: Tensor) -> Tensor:
                embeddings = self.embed(features)
                return loss(embeddings @ embeddings.T, self.config.w_init, chosen, self.config) + 0 * features.sum()

            step = context.gradient("train", virtual, list(head.values()))
            shift = {n: -lr * g for n, g in step.trunk.items()}
            head = {n: (p - lr * g).detach().requires_grad_() for (n, p), g in zip(head.items(), step.own, strict=True)}

        def objective(features: Tensor) -> Tensor:
            embeddings = torch.func.functional_call(self.head, head, (features,))
            found = meta_loss(embeddings, batch.labels[meta], batch.ids[meta], memory, self.config)
            return found + 0 * features.sum()  # where no image has a pair

        return context.gradient("meta", objective, list(head.values()), shift)

    def _along(self, gradient: Gradient, context: Context) -> Float[Tensor, "batch dim"]:
        """Derivative of the batch's embeddings when trunk and head move along a gradient."""
        features, along = context.derivative("train", gradient.trunk)
        head = {n: p.detach() for n, p in self.head.named_parameters()}
        with torch.no_grad():
            tangent: Tensor = torch.func.jvp(
                lambda f, p: torch.func.functional_call(self.head, p, (f,)),
                (features, head),
                (along, dict(zip(head, gradient.own, strict=True))),
            )[1]
        return tangent

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        """The plain loss, `meta: false`."""
        similarity = embeddings @ embeddings.T
        return loss(similarity, 1.0, select(similarity, labels, self.config), self.config)

    def _logs(self, value: Tensor, meta: float | None, weights: Tensor | None, chosen: Selection) -> dict[str, float]:
        logs = {"loss": float(value.detach()), "pairs": float(chosen.slots.sum())}
        logs |= {
            f"skipped/{n}": float(v) for n, v in zip(("warm_up", "meta_zero", "no_weight"), self.skipped, strict=True)
        }
        if weights is not None and meta is not None:
            logs["meta_loss"] = meta
            signs = {"triplet": chosen.slots} if self.config.loss == "triplet" else {
                "positive": chosen.positives, "negative": chosen.negatives}  # fmt: skip
            for sign, mask in signs.items():
                of = weights[mask] if bool(mask.any()) else weights.new_zeros(1)
                logs |= {f"weight/{sign}_max": float(of.max()), f"weight/{sign}_mean": float(of.mean())}
        return logs


def _held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Samples kept for meta batches: a share of each class of two images or more, at least one."""
    random = np.random.default_rng([seed, 0x3E2])
    order = np.lexsort((random.random(len(labels)), labels))
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    most = np.where(sizes > 1, np.maximum(1, np.round(share * sizes)), 0)
    return np.sort(order[rank < np.repeat(np.minimum(most, sizes - 1), sizes)])


__all__ = ["Mmsi", "MmsiConfig"]
