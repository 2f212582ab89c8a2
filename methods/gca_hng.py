"""GCA-HNG: globally correlation-aware hard negative generation (Peng et al., IJCV 133(5), 2025, arXiv 2411.13145).

A graph network sees all images of the batch and predicts, for each pair and channel, how far a negative may be pulled
towards the anchor; the pulled negatives, harder than the real ones, train the embedding. For P classes × K images, the
embeddings z (not normalised while training) and ρ = 7.5e-4:

    û = z - mean over channels, of length 1;  E⁰_ij = û_i ⊙ û_j;  n⁰ = W z            (`methods.gca_hng_graph`)
    (n, E) through L layers;  λ = sigmoid(W_λ BN(E^L)) in (0, 1);  p = W_p BN(n^L)
    d⁺, d⁻: distances to the positive (the class's next image) and to the negative
    r = (d⁺ + (d⁻ - d⁺) λ exp(-α / J̄_m)) / d⁻;   ẑ = z + (z⁻ - z) ⊙ r, z⁻ itself where d⁺ >= d⁻
    the K pulled negatives of a class are joined by a chain of random interpolations: Ẑ [K, P, P, D]
    J_m: N-pair of the batch.  J_syn: N-pair with Ẑ as negatives.  J_gce = CE(p)
    J_gen = ½ (s · CE(S(Ẑ), class) + d · mean (1 - cos(z, Ẑ)) + v · 0.01 (1 - spread of λ))

One iteration: (A) embedding and graph step on J_m + (1 - exp(-β / J̄_gen)) J_syn + J_gce, λ constant; (B) the classifier S
steps on 10 CE(S(z)), z constant; (C) the graph steps on J_gen, z constant. J̄ are means over the last epoch, 1e6 in the
first. During `warmup` the trunk is not trained. Retrieval uses z / |z|; graph and classifier are discarded.

Deviations: own-class entries are left out of the similarity term as the formula says (the authors' program leaves out
others: `similarity_mask: reference`); one dropout mask for E_ij and E_ji, which are equal (`edge_symmetry: false` draws
two); statistics of the graph's batch norms are not kept, nothing reads them; the sampler's lists start anew each epoch; images are
resized bicubically in evaluation, as everywhere in this program, where the authors' program resizes bilinearly.
`base_loss: proxy_anchor` is ours: Proxy Anchor (Kim et al., CVPR 2020) in place of the N-pair J_m, J_syn as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from methods.base import Batch, Context, Method, MethodConfig, Ranks
from methods.config import Length
from methods.gca_hng_graph import CorrelationGraph
from methods.head import HeadConfig
from methods.optim import Optimizer, OptimizerConfig, build_optimizer
from methods.plans import Plan, uniform_classes

RHO = 3e-3 * 0.25
FIRST_MEAN = 1e6  # value of both running means in the first epoch


class GcaHngConfig(MethodConfig):
    name: Literal["gca_hng"] = "gca_hng"
    classes_per_batch: int = Field(27, ge=2, description="P: classes in a batch")
    samples_per_class: int = Field(3, ge=2, description="K: images of one class in a batch")
    embedding_dim: int = Field(512, ge=2, description="D: dimension of the embedding")
    base_loss: Literal["npair", "proxy_anchor"] = Field(
        "npair", description="J_m: the metric loss; proxy_anchor is not in the paper"
    )
    generate: bool = Field(True, description="generate hard negatives; false: J_m alone, without graph and classifier")
    layers: int = Field(2, ge=1, description="L: rounds of node and edge messages")
    heads: int = Field(4, ge=1, description="heads of the node attention; a divisor of embedding_dim")
    edge_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the two weights of the edge attention")
    alpha: float = Field(
        5.0, gt=0, description="α: the larger, the later in training negatives are generated close to the anchor"
    )
    beta: float = Field(20.0, gt=0, description="β: the larger, the earlier in training J_syn has weight")
    softmax_weight: float = Field(20.0, ge=0, description="s: weight of the softmax term")
    similarity_weight: float = Field(20.0, ge=0, description="d: weight of the similarity term")
    diversity_weight: float = Field(60.0, ge=0, description="v: weight of the diversity term")
    orthogonal_neck: bool = Field(
        False, description="initialise the head with orthogonal weights and zero bias (the DINO recipes)"
    )
    warmup: Length = Field(
        Length(value=2, unit="epochs"), description="time for which the trunk is not updated, steps or epochs"
    )
    similarity_mask: Literal["correct", "reference"] = Field(
        "correct",
        description="which entries the similarity term leaves out: own classes | those the authors' code does",
    )
    edge_symmetry: bool = Field(
        True, description="compute each unordered pair once: the same result with half the work"
    )
    shard_edges: bool = Field(False, description="share pairs among the workers, for large batches: the same result")
    zero_gradients: bool = Field(
        True,
        description="graph parameters that a phase does not use step with gradient 0 (decay, momentum) | are not updated",
    )
    proxy_margin: float = Field(0.1, description="proxy_anchor: margin of the similarities")
    proxy_scale: float = Field(32.0, gt=0, description="proxy_anchor: scale of the similarities")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1.5e-4, weight_decay=1e-4, clip_value=10)
    graph_optimizer: OptimizerConfig = OptimizerConfig(lr=1.5e-4, weight_decay=1e-4, clip_value=10)
    classifier_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, weight_decay=0.01)

    @property
    def has_proxies(self) -> bool:
        return self.base_loss == "proxy_anchor"

    @property
    def is_class_balanced(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check_head(self) -> GcaHngConfig:
        if self.generate and self.embedding_dim % self.heads:
            raise ValueError(
                f"heads is {self.heads}, embedding_dim {self.embedding_dim}: the dimension has to be a multiple of the heads"
            )
        if self.head != HeadConfig():
            raise ValueError("head is for other methods: this one has batch norm and a linear layer (orthogonal_neck)")
        return self


class Neck(nn.Module):
    """Batch norm and a linear layer: pooled features [B, F] to embeddings [B, D], not normalised."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.linear = nn.Linear(features, dim)

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return self.linear(self.norm(features))


class BatchLayout(NamedTuple):
    """A batch in sample-major order: slot k·P + i is image k of class i.

    Attributes:
        classes, samples: P and K.
        labels: Class of each slot; the first P are the classes in order.
        rows: The slots for which this process computes negatives.
    """

    classes: int
    samples: int
    labels: Int64[Tensor, " batch"]
    rows: slice

    def positives(self) -> Int64[Tensor, " batch"]:
        """For each slot, the next image of its class."""
        return torch.arange(len(self.labels), device=self.labels.device).roll(-self.classes)


def npair(
    z: Float[Tensor, "batch dim"], classes: int, class_labels: Int64[Tensor, " classes"] | None = None
) -> Float[Tensor, ""]:
    """J_m (N-pair, Sohn, NIPS 2016): the first image of each class is the anchor.

        J_m = mean over k >= 1 of CE(Z_0 Z_kᵀ, own class) + ρ/P Σ |z|²

    Args:
        z: Embeddings, sample-major.
        classes: P, the number of classes.
        class_labels: Labels of the P columns; columns of equal label share the target. None: all differ.
    """
    chunks = z.unflatten(0, (-1, classes))
    if class_labels is None:
        target = torch.eye(classes, dtype=z.dtype, device=z.device)
    else:
        target = (class_labels[:, None] == class_labels[None]).to(z.dtype)
        target = target / target.sum(1, keepdim=True)
    entropy = torch.stack([F.cross_entropy(chunks[0] @ chunk.T, target) for chunk in chunks[1:]]).mean()
    return entropy + RHO / classes * (z * z).sum()


def distances(
    anchors: Float[Tensor, "rows dim"], others: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, "rows batch dim"], Float[Tensor, "rows batch"]]:
    """Differences other - anchor, and |anchor - other + 1e-6| with the 1e-6 added to every channel."""
    difference = others[None] - anchors[:, None]
    return difference, (difference - 1e-6).square().sum(-1).clamp(min=1e-24).sqrt()


def synthesise(
    z: Float[Tensor, "batch dim"],
    lam: Float[Tensor, "rows batch dim"],
    layout: BatchLayout,
    strength: float | Tensor,
    uniforms: Float[Tensor, "samples chain"],
) -> Float[Tensor, "rows classes dim"]:
    """Pulled and joined negatives Ẑ: one for each anchor and class (for the own class too: nearly always the positive).

    Args:
        z: Embeddings, sample-major.
        lam: λ of the anchors in `layout.rows`.
        layout: Layout of the batch.
        strength: exp(-α / J̄_m).
        uniforms: Weights of the chain's interpolations, [K, K - 1], one for each anchor chunk and link.
    """
    anchors = z[layout.rows]
    difference, d_negative = distances(anchors, z)
    anchor_slots = torch.arange(len(z), device=z.device)[layout.rows]
    d_positive = d_negative.gather(1, layout.positives()[anchor_slots][:, None])
    already_hard = d_positive >= d_negative  # a negative that is hard already, and every image itself
    ratio = (d_positive[..., None] + (d_negative - d_positive)[..., None] * (lam * strength)) / d_negative.clamp(
        min=1e-6
    )[..., None]
    pulled = torch.where(already_hard[..., None], z[None], anchors[:, None] + difference * ratio)
    chunks = pulled.unflatten(1, (layout.samples, layout.classes))
    joined = chunks[:, 0]
    for m in range(1, layout.samples):
        interpolation = uniforms[anchor_slots // layout.classes, m - 1][:, None, None]
        joined = torch.lerp(chunks[:, m], joined, interpolation.expand_as(joined))
    return joined


def synthetic_npair(
    z: Float[Tensor, "batch dim"], joined: Float[Tensor, "rows classes dim"], layout: BatchLayout
) -> Float[Tensor, ""]:
    """Share of J_syn of this process's rows: each anchor against its positive and the pulled negatives of other classes."""
    anchor_slots = torch.arange(len(z), device=z.device)[layout.rows]
    anchors, column = z[anchor_slots], anchor_slots % layout.classes
    is_own = F.one_hot(column, layout.classes).bool()
    targets = torch.where(is_own[..., None], z[layout.positives()[anchor_slots]][:, None], joined)
    entropy = F.cross_entropy((anchors[:, None] * targets).sum(-1), column, reduction="sum")
    norms = (anchors * anchors).sum() + (targets * targets).sum() / layout.classes
    return (entropy + RHO * norms) / len(z)


def similarity_term_mask(layout: BatchLayout, reference: bool) -> Bool[Tensor, "rows classes"]:
    """Mask of the (anchor, class) pairs in the similarity term: classes other than the anchor's.

    `reference`: as the authors' program indexes them; it removes K of the K·P own-class entries, and real negatives.
    """
    k, c = layout.samples, layout.classes
    mask = torch.ones(k * c * c, dtype=torch.bool, device=layout.labels.device)
    chunk, column = torch.meshgrid(torch.arange(k), torch.arange(c), indexing="ij")
    if reference:
        mask[(column * (k * c) + chunk * c + column).flatten()] = False
    else:
        mask[(chunk * c * c + column * c + column).flatten()] = False
    return mask.view(k * c, c)[layout.rows]


class GcaHng(Method):
    Config = GcaHngConfig
    metric_mean: Tensor
    generator_mean: Tensor
    sums: Tensor
    iterations: Tensor

    def __init__(self, config: GcaHngConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.head = Neck(features, config.embedding_dim)  # type: ignore[assignment]
        if config.orthogonal_neck:
            nn.init.orthogonal_(self.head.linear.weight)
            nn.init.zeros_(self.head.linear.bias)
        self.proxies: nn.Module | None = None
        if config.base_loss == "proxy_anchor":
            from pytorch_metric_learning.losses import ProxyAnchorLoss  # here: it loads scipy, over 1 CPU-s

            self.proxies = ProxyAnchorLoss(num_classes, config.embedding_dim, config.proxy_margin, config.proxy_scale)
        if config.generate:
            self.graph = CorrelationGraph(
                config.embedding_dim,
                num_classes,
                config.layers,
                config.heads,
                config.edge_dropout,
                config.edge_symmetry,
            )
            self.classifier = nn.Linear(config.embedding_dim, num_classes)
        self.register_buffer("metric_mean", torch.tensor(FIRST_MEAN, dtype=torch.float64))  # J̄_m
        self.register_buffer("generator_mean", torch.tensor(FIRST_MEAN, dtype=torch.float64))  # J̄_gen
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of J_m, J_gen and steps, this epoch
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))

    def plan(self, epoch: int, context: Context) -> Plan:
        c = self.config
        return uniform_classes(context.labels, c.classes_per_batch, c.samples_per_class, context.seed, epoch)

    def optimizers(self, trunk: nn.Module) -> dict[str, Optimizer]:
        c = self.config
        loss = [] if self.proxies is None else list(self.proxies.parameters())
        main_groups = {"trunk": trunk.parameters(), "head": self.head.parameters(), "loss": loss}
        optimizers = {"main": build_optimizer(c.optimizer, main_groups)}
        if c.generate:
            optimizers["graph"] = build_optimizer(c.graph_optimizer, {"graph": self.graph.parameters()})
            optimizers["classifier"] = build_optimizer(
                c.classifier_optimizer, {"classifier": self.classifier.parameters()}
            )
        return optimizers

    def embed(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch dim"]:
        return F.normalize(self.head(features))

    def on_epoch_end(self, epoch: int, context: Context, metrics: object) -> None:
        steps = self.sums[2]
        if steps > 0:
            self.metric_mean.copy_(self.sums[0] / steps)
            self.generator_mean.copy_(self.sums[1] / steps if self.config.generate else self.generator_mean)
        self.sums.zero_()

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        frozen = self.config.warmup.fraction_done(context.clock) < 1
        with torch.no_grad() if frozen else nullcontext():
            features = context.encode()
        ranks = context.ranks if self.config.generate and self.config.shard_edges else None
        order, layout = self._layout(batch.labels, ranks)
        uniforms = [self._uniforms(context) for _ in range(2)]
        return self.iterate(features[order], layout, uniforms, context, ranks)

    def _layout(self, labels: Tensor, ranks: Ranks | None) -> tuple[Tensor, BatchLayout]:
        """Order of the slots that makes a class-major batch sample-major, and the layout it has then."""
        k = self.config.samples_per_class
        grouped = labels.view(-1, k)
        if (grouped != grouped[:, :1]).any():
            raise ValueError(f"every {k} slots have to be of one class: use plans.uniform_classes")
        order = torch.arange(len(labels), device=labels.device).view(-1, k).T.flatten()
        rows = slice(0, len(labels)) if ranks is None else ranks.slice(len(labels))
        return order, BatchLayout(len(grouped), k, labels[order], rows)

    def _uniforms(self, context: Context) -> Tensor:
        k = self.config.samples_per_class
        uniforms = torch.rand(k, k - 1, generator=context.generator, device=context.device, dtype=torch.float64)
        return uniforms.to(context.dtype)

    # ---- one iteration -------------------------------------------------------------------------------------------

    def iterate(
        self,
        features: Float[Tensor, "batch features"],
        layout: BatchLayout,
        uniforms: Sequence[Tensor],
        context: Context,
        ranks: Ranks | None = None,
    ) -> dict[str, float]:
        """The phases A, B and C on one batch, sample-major; returns the metrics to log.

        Args:
            features: Pooled features, sample-major.
            layout: Layout of the batch.
            uniforms: Weights of the interpolations of phases A and C, [K, K - 1] each.
            context: The context, for backward passes and optimizer steps.
            ranks: The processes that divide the pairs among them; None: every process computes all.
        """
        z = self.head(features)
        metric = self._metric_loss(z, layout)
        logs = {"metric": metric}
        if not self.config.generate:
            context.backward(metric)
            context.step("main")
            return self._accumulate_and_log(logs | {"loss": metric}, metric, None)
        labels = layout.labels
        # A: embedding and graph, λ constant
        lam, logits = self.graph(z, labels, ranks, train_lambda=False)
        joined = synthesise(self._copy_to_ranks(z, ranks), lam[layout.rows], layout, self._pull_strength(), uniforms[0])
        synthetic = self._sum_over_ranks(synthetic_npair(self._copy_to_ranks(z, ranks), joined, layout), ranks)
        weight = 1 - torch.exp(-self.config.beta / self.generator_mean).to(z.dtype)
        entropy = F.cross_entropy(logits, labels)
        loss = metric + weight * synthetic + entropy
        context.backward(loss)
        context.step("main")
        self._step_graph(context, first=int(self.iterations) == 0)
        z = z.detach()
        logs |= {"loss": loss, "synthetic": synthetic, "graph_cross_entropy": entropy}
        del lam, logits, joined
        # B: classifier
        classified = 10 * F.cross_entropy(self.classifier(z), labels)
        context.backward(classified)
        context.step("classifier")
        # C: graph, z constant
        generator_terms = self.generator_loss(z, layout, uniforms[1], ranks)
        context.backward(generator_terms["generator"])
        self._step_graph(context, first=False)
        return self._accumulate_and_log(
            logs | {"classifier": classified} | generator_terms, metric, generator_terms["generator"]
        )

    def _metric_loss(self, z: Tensor, layout: BatchLayout) -> Tensor:
        if self.proxies is not None:
            return self.proxies(z, layout.labels)
        return npair(z, layout.classes, layout.labels[: layout.classes])

    def generator_loss(
        self, z: Float[Tensor, "batch dim"], layout: BatchLayout, uniforms: Tensor, ranks: Ranks | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """J_gen and its parts, with gradient to the graph's parameters alone."""
        c, rows = self.config, layout.rows
        lam, _ = self.graph(z, layout.labels, ranks, train_lambda=True, classify=False)
        lam = lam[rows]
        joined = synthesise(z, lam, layout, self._pull_strength(), uniforms)
        count = len(z) * layout.classes
        scores = F.linear(joined.flatten(0, 1), self.classifier.weight.detach(), self.classifier.bias.detach())
        target_classes = layout.labels[: layout.classes].repeat(len(joined))
        softmax_term = self._sum_over_ranks(F.cross_entropy(scores, target_classes, reduction="sum") / count, ranks)
        term_mask = similarity_term_mask(layout, c.similarity_mask == "reference")
        cosine_distances = (1 - F.cosine_similarity(z[rows][:, None], joined, dim=-1)) * term_mask
        similarity = self._sum_over_ranks(cosine_distances.sum() / count, ranks)
        spread = self._sum_over_ranks((lam - lam.mean(1, keepdim=True)).square().sum() / len(z) ** 2, ranks)
        diverse = 1e-2 * (1 - spread.sqrt())
        softmax_term = c.softmax_weight * softmax_term
        generator = 0.5 * (softmax_term + c.similarity_weight * similarity + c.diversity_weight * diverse)
        return {"generator": generator, "soft": softmax_term, "similarity": similarity, "diversity": diverse}

    def _pull_strength(self) -> Tensor:
        dtype = self.classifier.weight.dtype
        return torch.exp(-self.config.alpha / self.metric_mean).to(dtype)

    def _step_graph(self, context: Context, first: bool) -> None:
        """Steps the graph's optimizer; except in its first step, parameters without gradient get the gradient 0."""
        if self.config.zero_gradients and not first:
            for parameter in self.graph.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        context.step("graph")

    def _accumulate_and_log(
        self, logs: dict[str, Tensor], metric: Tensor, generator: Tensor | None
    ) -> dict[str, float]:
        with torch.no_grad():
            self.sums[0] += metric.clamp(min=1e-6).double()
            self.sums[1] += 0.0 if generator is None else generator.clamp(min=1e-6).double()
            self.sums[2] += 1
            self.iterations += 1
        return {name: float(value.detach()) for name, value in logs.items()}

    @staticmethod
    def _copy_to_ranks(x: Tensor, ranks: Ranks | None) -> Tensor:
        return x if ranks is None else ranks.copy_to_ranks(x)

    @staticmethod
    def _sum_over_ranks(x: Tensor, ranks: Ranks | None) -> Tensor:
        return x if ranks is None else ranks.sum_over_ranks(x)


__all__ = ["GcaHng", "GcaHngConfig"]
