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
With w_init = 0 the virtual gradient is zero, θ̂ = θ, and lr cancels in w*. `loss` is one of `mmsi_losses.py`; the meta loss is the
same one, of the meta batch against the memory, every weight 1, without mining.

Released by the authors: contrastive and multi_similarity; the others follow from the same scheme. Beside the paper's name
for things: their meta batch comes from the training images themselves (`meta_source: train`), not from a validation set.
With multi_similarity and w_init = 0 a negative's weight carries the factor e^{-αλ} (2e-9), so that the step is one on the
positives alone: that is what the authors' program does, and what the defaults do.

Deviations: `norm_scope: per_sign`, `w_init` above 0, `weight_floor` and `weighting: gradient` are ours. The last takes the weights out
of the loss: a pair's part of the gradient, g = ∂L/∂s, is multiplied by w, so that u = lr g Ṡ; inside the loss a weight below 1 changes
how hard a pair seems as well: a negative of similarity 0.7 and weight 0.1 counts like one of 0.07, that is, not at all. Self-pairs are left out by position (theirs: by s < 1);
masks are found once a step (theirs: twice); a step without any positive u is skipped and counted (theirs: weights become
NaN); contrastive is 1 - s (theirs, by a slip, -(1 + s): other values, the same gradients). The meta batch follows from
(seed, step); theirs pauses while the memory fills. `meta_start` trains on the plain loss first, within the run. The virtual
step has one rate for trunk and head.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from methods.base import Batch, Context, Gradient, Method
from methods.mining import Memory
from methods.mmsi_losses import Selection
from methods.mmsi_weights import (
    MmsiConfig,
    gradient_of_weights,
    meta_loss,
    normalise_weights,
    raise_weights,
    select_pairs,
    weighted_loss,
)
from methods.plans import Plan, each_class_once, join_roles
from methods.random_streams import Stream


class Mmsi(Method):
    Config = MmsiConfig
    skipped: Tensor

    def __init__(self, config: MmsiConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.warmup = min(config.warmup_classes, num_classes)
        self._check_memory()
        # steps without an update: memory too small, meta loss zero, no weight above zero
        self.register_buffer("skipped", torch.zeros(3, dtype=torch.int64))

    def _check_memory(self) -> None:
        """Raises ValueError where the memory can never hold the classes of the warm-up, and so nothing would ever be trained.

        Each class puts K images in a row, of which at most `memory_per_class` stay; beside the memory's classes, those of the batch count.
        """
        c = self.config
        if not c.meta or c.memory_total is None:
            return
        entries = min(c.samples_per_class, c.memory_per_class)  # of one class
        most = -(-c.memory_total // entries) + c.classes_per_batch
        if most < self.warmup:
            needed = (self.warmup - c.classes_per_batch) * entries
            raise ValueError(
                f"memory_total is {c.memory_total}, which holds {most - c.classes_per_batch} classes of {entries} images beside "
                f"the {c.classes_per_batch} of a batch, but nothing is learnt before there are {self.warmup} (warmup_classes): set memory_total "
                f"to {needed} or more, or lower warmup_classes"
            )

    def plan(self, epoch: int, context: Context) -> Plan:
        """Batches of P classes × K images, each class once an epoch, each with a meta batch (roles `train` and `meta`)."""
        c = self.config
        labels = context.labels
        seed = context.seed
        all_samples = np.arange(len(labels))
        holdout = _held_out(labels, c.meta_share, seed) if c.meta and c.meta_source == "holdout" else all_samples[:0]
        training_samples = np.setdiff1d(all_samples, holdout)
        plan = each_class_once(labels[training_samples], c.classes_per_batch, c.samples_per_class, seed, epoch)
        plan = Plan(training_samples[plan.ids])
        if not c.meta:
            return plan
        source = holdout if c.meta_source == "holdout" else all_samples
        return join_roles({"train": plan, "meta": self._meta_batches(labels, source, seed, epoch, len(plan))})

    def _meta_batches(self, labels: np.ndarray, source: np.ndarray, seed: int, epoch: int, steps: int) -> Plan:
        """The epoch's part of an endless sequence of passes over all classes."""
        num_classes = len(np.unique(labels[source]))
        steps_per_pass = num_classes // self.config.meta_classes
        if steps_per_pass == 0:
            raise ValueError(
                f"meta_classes is {self.config.meta_classes}, but the meta images have {num_classes} classes: lower meta_classes"
            )
        first = epoch * steps // steps_per_pass
        last = ((epoch + 1) * steps - 1) // steps_per_pass
        passes = [
            each_class_once(labels[source], self.config.meta_classes, 1, seed + 1, p).ids
            for p in range(first, last + 1)
        ]
        start = epoch * steps - first * steps_per_pass
        return Plan(source[np.concatenate(passes)[start : start + steps]])

    def training_step(self, batch: Batch, context: Context) -> Mapping[str, float | Tensor]:
        c = self.config
        if not c.meta:
            return super().training_step(batch, context)
        assert context.mining is not None and context.mining.memory is not None
        rows = [np.flatnonzero(batch.columns["role"] == name) for name in ("train", "meta")]
        train, meta = (torch.from_numpy(slots).to(batch.ids.device, non_blocking=True) for slots in rows)
        host_ids, host_labels = batch.host_ids[rows[0]], batch.host_labels[rows[0]]
        labels, memory = batch.labels[train], context.mining.memory
        plain = c.meta_start.fraction_done(context.clock) < 1
        num_known_classes = len(memory.classes) + len(set(host_labels.tolist()).difference(memory.classes))
        with torch.set_grad_enabled(plain or num_known_classes >= self.warmup):
            embeddings = self.embed(
                context.encode("train", keep_for_jvp=not plain and num_known_classes >= self.warmup)
            )
        context.mining.put(torch.from_numpy(host_ids), embeddings.detach(), torch.from_numpy(host_labels))
        similarity = embeddings @ embeddings.T
        selection = select_pairs(similarity, labels, c)
        if plain:
            value = weighted_loss(similarity, 1.0, selection, c)
            context.backward(value)
            context.step("main")
            return self._logs(value, None, None, selection)
        if num_known_classes < self.warmup:
            self.skipped[0] += 1
            return self._logs(weighted_loss(similarity, 1.0, selection, c), None, None, selection)

        lr = c.optimizer.lr * c.optimizer.schedule.factor(context.clock, context.length)
        gradient = self._meta_gradient(batch, selection, train, meta, lr, context, memory)
        weights = torch.zeros(selection.slots.shape, dtype=similarity.dtype, device=similarity.device)
        if gradient.value != 0 and bool(selection.slots.any()):
            embedding_tangent = self._embedding_jvp(gradient, context).to(similarity.dtype)
            product = embedding_tangent @ embeddings.detach().T
            u = gradient_of_weights(similarity, product + product.T, selection, lr, c)
            weights = raise_weights(self.pair_weights(u, selection), selection, c.weight_floor)
        value = weighted_loss(similarity, weights, selection, c)
        if bool((weights > 0).any()):
            context.backward(value)
            context.step("main")
        else:
            self.skipped[1 if gradient.value == 0 else 2] += 1
            context.backward(0 * embeddings.sum())  # DDP expects a backward pass for every forward pass
        return self._logs(value, gradient.value, weights, selection)

    def pair_weights(self, u: Float[Tensor, "rows n"], selection: Selection) -> Float[Tensor, "rows n"]:
        """The weights w* of a step, in 0..1, of its u."""
        return normalise_weights(u, selection, self.config.norm_scope)

    def _meta_gradient(
        self,
        batch: Batch,
        selection: Selection,
        train: Tensor,
        meta: Tensor,
        lr: float,
        context: Context,
        memory: Memory,
    ) -> Gradient:
        """Gradient of the meta loss with respect to trunk and head, at θ̂, the parameters after a virtual step."""
        head: dict[str, Tensor] = dict(self.head.named_parameters())
        shift: Mapping[str, Tensor] | None = None
        if self.config.w_init:  # about 0 the virtual gradient is 0

            def virtual_loss(features: Tensor) -> Tensor:
                embeddings = self.embed(features)
                return (
                    weighted_loss(embeddings @ embeddings.T, self.config.w_init, selection, self.config)
                    + 0 * features.sum()
                )

            virtual_gradient = context.gradient("train", virtual_loss, list(head.values()))
            shift = {n: -lr * g for n, g in virtual_gradient.trunk.items()}
            head = {
                n: (p - lr * g).detach().requires_grad_()
                for (n, p), g in zip(head.items(), virtual_gradient.extra, strict=True)
            }

        def objective(features: Tensor) -> Tensor:
            embeddings = torch.func.functional_call(self.head, head, (features,))
            value = meta_loss(embeddings, batch.labels[meta], batch.ids[meta], memory, self.config)
            return value + 0 * features.sum()  # has a gradient also where no image has a pair

        return context.gradient("meta", objective, list(head.values()), shift)

    def _embedding_jvp(self, gradient: Gradient, context: Context) -> Float[Tensor, "batch dim"]:
        """Derivative of the batch's embeddings along a gradient of the parameters of trunk and head."""
        features, feature_tangent = context.jvp("train", gradient.trunk)
        head = {n: p.detach() for n, p in self.head.named_parameters()}
        with torch.no_grad():
            tangent: Tensor = torch.func.jvp(
                lambda f, p: torch.func.functional_call(self.head, p, (f,)),
                (features, head),
                (feature_tangent, dict(zip(head, gradient.extra, strict=True))),
            )[1]
        return tangent

    @property
    def skipped_steps(self) -> Mapping[str, int]:
        reasons = (
            "the memory held fewer classes than warmup_classes", "the meta loss was zero", "no pair had a weight above zero"
        )  # fmt: skip
        return dict(zip(reasons, self.skipped.tolist(), strict=True))

    def loss(
        self, embeddings: Float[Tensor, "batch dim"], labels: Int64[Tensor, " batch"], context: Context
    ) -> Float[Tensor, ""]:
        """The plain loss, `meta: false`."""
        similarity = embeddings @ embeddings.T
        return weighted_loss(similarity, 1.0, select_pairs(similarity, labels, self.config), self.config)

    def _logs(
        self, value: Tensor, meta: float | None, weights: Tensor | None, selection: Selection
    ) -> Mapping[str, float | Tensor]:
        logs: dict[str, float | Tensor] = {"loss": value.detach(), "pairs": selection.slots.sum()}
        names = ("warm_up", "meta_zero", "no_weight")
        logs |= {f"skipped/{n}": v for n, v in zip(names, self.skipped.clone(), strict=True)}
        if weights is not None and meta is not None:
            logs["meta_loss"] = meta
            signs = {"triplet": selection.slots} if self.config.loss == "triplet" else {
                "positive": selection.positives, "negative": selection.negatives}  # fmt: skip
            for sign, mask in signs.items():
                masked_weights = F.pad((weights * mask).flatten(), (0, 1))  # at least one number; none is negative
                logs |= {
                    f"weight/{sign}_max": masked_weights.max(),
                    f"weight/{sign}_mean": masked_weights.sum() / mask.sum().clamp(min=1),
                }
        return logs


def _held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Samples reserved for meta batches: a share of each class of two images or more, at least one."""
    random = np.random.default_rng([seed, Stream.MMSI_HOLDOUT])
    order = np.lexsort((random.random(len(labels)), labels))
    sizes = np.bincount(labels)
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    num_held_out = np.where(sizes > 1, np.maximum(1, np.round(share * sizes)), 0)
    return np.sort(order[rank_in_class < np.repeat(np.minimum(num_held_out, sizes - 1), sizes)])


__all__ = ["Mmsi", "MmsiConfig"]
