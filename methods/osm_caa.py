"""OSM+CAA: online soft mining and class-aware attention (Wang, Hua, Kodirov, Hu, Robertson, AAAI 2019, arXiv 1811.01459).

Every pair of the batch counts, with a soft weight: larger for close positives and close negatives (soft mining), and for
images that a classifier is confident of (attention). For z = W f, ẑ = z / |z|, d_ij = |ẑ_i - ẑ_j| and unordered pairs:

    s+_ij = exp(-d_ij² / σ²)           s-_ij = max(0, α - d_ij)
    a_i = p_i, the classifier's probability of the own class;   w_ij = s_ij min(a_i, a_j), a constant
    L_P = ½ Σ_P w d² / Σ_P w           L_N = ½ Σ_N w max(0, α - d)² / Σ_N w
    L = CE + w_metric ((1 - λ) L_P + λ L_N)

`mode: paper` is these formulas. `mode: caffe` is what the authors' program computes, which made the published tables:
s+ = N(d; 0, σ), a = N(p; 1, 0.68), cross-entropy weighted by N(p; 0.5, 0.18), and a metric loss that is divided by
the number of pairs once more. Video (`frames` > 1): every `frames` slots are a tracklet; the frames' features, averaged
with their attention, are classified and compared a second time, as tracklets.

Deviations: one embedding is classified, compared and retrieved (the authors' network classifies three layers, compares
the second and retrieves the third); biases of the classifier learn and decay like its weights (theirs at twice the rate,
without decay); distances below 1e-6 count as 1e-6 in the hinge's gradient, so that the same image twice in a batch is
harmless; batches of images are class-balanced and an epoch uses every image, where the authors' program draws each batch anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Context, Method, MethodConfig
from methods.plans import Plan
from methods.tracklets import tracklets


class OsmCaaConfig(MethodConfig):
    name: Literal["osm_caa"] = "osm_caa"
    classes_per_batch: int = Field(8, ge=2, description="P: groups of different classes in a batch")
    samples_per_class: int = Field(7, ge=2, description="K: images of one class in a batch")
    mode: Literal["paper", "caffe"] = Field("paper", description="the paper's formulas | the authors' program")
    alpha: float = Field(1.2, gt=0, description="α: distance beyond which a negative does not count")
    sigma: float = Field(0.8, gt=0, description="σ of the positives' soft weight")
    lam: float = Field(0.5, ge=0, le=1, description="λ: share of the negatives in the metric loss")
    osm: bool = Field(
        True, description="soft mining; false: all positives and all close negatives have the same weight"
    )
    caa: bool = Field(True, description="class-aware attention; false: every pair has the same attention")
    caa_logits: Literal["raw", "fnorm", "cosine"] = Field(
        "raw", description="classifier on z with bias | on z / |z| with bias | cosine of z and the class vectors"
    )
    caa_mean: float = Field(1.0, description="caffe: mean of the attention's Gaussian")
    caa_sigma: float = Field(0.68, gt=0, description="caffe: width of the attention's Gaussian")
    detach_weights: bool = Field(True, description="treat weights as constants; false: gradients flow through them")
    w_metric: float | None = Field(
        None, ge=0, description="weight of the metric loss (none: 1, in caffe mode 1 / number of pairs)"
    )
    ce_weighting: Literal["none", "gauss"] | None = Field(
        None, description="cross-entropy of each image weighted by N(p; ce_mean, ce_sigma) (none: in caffe mode only)"
    )
    ce_mean: float = Field(0.5, description="gauss: mean of the weight of the cross-entropy")
    ce_sigma: float = Field(0.18, gt=0, description="gauss: width of the weight of the cross-entropy")
    global_pairs: bool = Field(
        True, description="use pairs of the whole batch; false: only pairs within a worker's share"
    )
    frames: int = Field(1, ge=1, description="video: consecutive slots of a class that form a tracklet")

    @property
    def is_class_balanced(self) -> bool:
        return self.frames == 1

    @model_validator(mode="after")
    def _check(self) -> OsmCaaConfig:
        if self.samples_per_class % self.frames:
            raise ValueError(
                f"samples_per_class is {self.samples_per_class}: expected a multiple of frames ({self.frames})"
            )
        if self.frames > 1 and not self.global_pairs:
            raise ValueError("global_pairs: false is for images, not for tracklets: set frames to 1")
        return self


class PairTerms(NamedTuple):
    """The metric loss and its terms.

    Attributes:
        loss: (1 - λ) L_P + λ L_N.
        positive, negative: L_P and L_N.
        weights: w_ij of every pair, [m, m], symmetric, 0 on the diagonal.
    """

    loss: Float[Tensor, ""]
    positive: Float[Tensor, ""]
    negative: Float[Tensor, ""]
    weights: Float[Tensor, "m m"]


def gaussian(value: Tensor, mean: float, sigma: float) -> Tensor:
    """Density of N(mean, sigma²)."""
    return torch.exp(-0.5 * ((value - mean) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def squared_distances(embeddings: Float[Tensor, "m dim"]) -> Float[Tensor, "m m"]:
    """|z_i - z_j|², from a product in float64: in float32, 1e-8 would be lost in 2 - 2 cos (images 1e-4 apart)."""
    wide = embeddings if embeddings.device.type == "mps" else embeddings.double()  # which has no float64
    norms = wide.square().sum(1)
    return (norms[:, None] + norms[None] - 2 * wide @ wide.T).clamp(min=0).to(embeddings.dtype)


def soft_mining_loss(
    embeddings: Float[Tensor, "m dim"],
    labels: Int64[Tensor, " m"],
    attention: Float[Tensor, " m"] | None,
    config: OsmCaaConfig,
) -> PairTerms:
    """The pair loss.

    Args:
        embeddings: ẑ, of length 1.
        labels: Class of each row.
        attention: a_i; None: all pairs have the same attention.
        config: The config, of which mode, alpha, sigma, lam, osm and detach_weights are used.

    Without a positive (or a close negative) pair its term is 0. Sums over ordered pairs are twice those over unordered
    ones, in numerator and denominator alike.
    """
    squared = squared_distances(embeddings)
    hinge = torch.relu(config.alpha - squared.clamp(min=1e-12).sqrt())
    same_class = labels[:, None] == labels[None]
    positives = same_class & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if config.osm:
        if config.mode == "paper":
            positive_weights = torch.exp(-squared / config.sigma**2)
        else:
            positive_weights = torch.exp(-squared / (2 * config.sigma**2)) / (config.sigma * math.sqrt(2 * math.pi))
        soft_weights = torch.where(same_class, positive_weights, hinge)
    else:
        soft_weights = torch.where(same_class, 1.0, (hinge > 0).to(hinge.dtype))
    if attention is not None:
        soft_weights = soft_weights * torch.minimum(attention[:, None], attention[None])
    weights = torch.where(
        positives | ~same_class, soft_weights.detach() if config.detach_weights else soft_weights, 0.0
    )
    positive = _weighted_mean(weights * positives, squared)
    negative = _weighted_mean(weights * ~same_class, hinge**2)
    return PairTerms((1 - config.lam) * positive + config.lam * negative, positive, negative, weights)


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    return 0.5 * (weights * values).sum() / (weights.sum() + 2e-12)


def weighted_cross_entropy(
    logits: Float[Tensor, "m classes"], labels: Int64[Tensor, " m"], mean: float, sigma: float
) -> Float[Tensor, ""]:
    """Cross-entropy that prefers images of medium confidence: weights N(p; mean, sigma), which sum to 1."""
    log_p = F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    weights = gaussian(log_p.detach().exp(), mean, sigma)
    return -(weights * log_p).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def attention_pool(
    features: Float[Tensor, "tracklets frames dim"], attention: Float[Tensor, "tracklets frames"]
) -> Float[Tensor, "tracklets dim"]:
    """Mean of a tracklet's frames, weighted by their attention (a constant)."""
    weights = attention.detach() / attention.detach().sum(1, keepdim=True).clamp(min=1e-12)
    return (weights[..., None] * features).sum(1)


class OsmCaa(Method):
    Config = OsmCaaConfig

    def __init__(self, config: OsmCaaConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.classifier = nn.Linear(config.embedding_dim, num_classes)
        self.tracklet_classifier = nn.Linear(config.embedding_dim, num_classes) if config.frames > 1 else None

    def plan(self, epoch: int, context: Context) -> Plan:
        """Batches of P classes × K images; for video, of P identities × tracklets × frames."""
        c = self.config
        if c.frames == 1:
            return super().plan(epoch, context)
        if context.tracks is None:
            raise ValueError(f"frames is {c.frames}, but the dataset has no tracklets: set frames to 1")
        return tracklets(
            context.labels,
            context.tracks,
            c.classes_per_batch,
            c.samples_per_class // c.frames,
            c.frames,
            context.seed,
            epoch,
        )

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        z = self.head.project(context.encode())
        terms = self.terms(z, batch.labels, context.shards if not self.config.global_pairs else (slice(None),))
        context.backward(terms["loss"])
        context.step("main")
        return {name: float(value.detach()) for name, value in terms.items()}

    def terms(
        self, z: Float[Tensor, "m dim"], labels: Int64[Tensor, " m"], shards: Sequence[slice] = (slice(None),)
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of a batch and its parts; `z` are the embeddings before normalisation.

        Args:
            z: Embeddings of images, or of the frames of consecutive tracklets.
            labels: Class of each row.
            shards: Slices within which pairs are formed; the metric loss is their mean.
        """
        frames = self.config.frames
        terms = self._classify_and_compare(self.classifier, z, labels, shards)
        if self.tracklet_classifier is not None:
            own_probability = self._probability(self.logits(self.classifier, z), labels)
            pooled = attention_pool(
                z.unflatten(0, (-1, frames)), self._attention(own_probability).unflatten(0, (-1, frames))
            )
            tracklet_terms = self._classify_and_compare(
                self.tracklet_classifier, pooled, labels[::frames], (slice(None),)
            )
            terms = {"loss": terms["loss"] + tracklet_terms["loss"], **{k: v for k, v in terms.items() if k != "loss"},
                   **{f"tracklet_{k}": v for k, v in tracklet_terms.items() if k != "loss"}}  # fmt: skip
        return terms

    def _classify_and_compare(
        self, classifier: nn.Linear, z: Tensor, labels: Tensor, shards: Sequence[slice]
    ) -> dict[str, Tensor]:
        config = self.config
        logits = self.logits(classifier, z)
        gaussian_weights = config.ce_weighting == "gauss" or (config.ce_weighting is None and config.mode == "caffe")
        entropy = (
            weighted_cross_entropy(logits, labels, config.ce_mean, config.ce_sigma)
            if gaussian_weights
            else F.cross_entropy(logits, labels)
        )
        own_probability = self._probability(logits, labels)
        attention = self._attention(own_probability) if config.caa else None
        embeddings = F.normalize(z)
        metric = z.new_zeros(())
        positive = z.new_zeros(())
        negative = z.new_zeros(())
        non_trivial_shards = [s for s in shards if len(labels[s]) > 1]
        for shard in non_trivial_shards:
            count = len(labels[shard])
            scale = config.w_metric
            if scale is None:
                scale = 2 / (count * (count - 1)) if config.mode == "caffe" else 1.0
            pair_terms = soft_mining_loss(
                embeddings[shard], labels[shard], None if attention is None else attention[shard], config
            )
            metric = metric + scale * pair_terms.loss / len(non_trivial_shards)
            positive = positive + pair_terms.positive / len(non_trivial_shards)
            negative = negative + pair_terms.negative / len(non_trivial_shards)
        return {"loss": entropy + metric, "cross_entropy": entropy, "metric": metric,
                "positive": positive, "negative": negative, "own_probability": own_probability.mean()}  # fmt: skip

    def logits(self, classifier: nn.Linear, z: Float[Tensor, "m dim"]) -> Float[Tensor, "m classes"]:
        """Logits of the classifier; see `caa_logits`."""
        if self.config.caa_logits == "raw":
            return classifier(z)
        if self.config.caa_logits == "fnorm":
            return classifier(F.normalize(z))
        return F.normalize(z) @ F.normalize(classifier.weight).T

    def _probability(self, logits: Tensor, labels: Tensor) -> Tensor:
        own_probability = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return own_probability.detach() if self.config.detach_weights else own_probability

    def _attention(self, own_probability: Tensor) -> Tensor:
        c = self.config
        return gaussian(own_probability, c.caa_mean, c.caa_sigma) if c.mode == "caffe" else own_probability


__all__ = ["OsmCaa", "OsmCaaConfig"]
