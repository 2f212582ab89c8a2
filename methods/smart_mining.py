"""Smart Mining (Harwood, Kumar, Carneiro, Reid, Drummond, ICCV 2017, arXiv 1704.01285).

At the start of every epoch all training images are embedded and the K nearest of each are listed. From an anchor's list come
hard triplets that are not too hard, and a controller sets how hard, so that training errs as often as it should.

    d the squared distance, +NN the nearest of the own class,  bound = κ d(+NN)
    n_t  the t-th entry after +NN of another class with d >= bound            t = 1, 2, ... of an anchor
    p_t  the first entry of the own class after n_t;   if there is none, a random one that the list does not offer

The nearest positive only sets the radius within which nothing is taken; it is never part of a triplet. (Summaries that pair it
with the nearest negative beyond it describe another rule.) So d(a, p) >= d(a, n) >= bound in every fully mined triplet: it
violates the margin, by as little as possible. Large κ: few negatives are left, the rest of the triplets is random; κ <= 1: the
hardest. The first epochs are random altogether.

    J_t = max(0, 1 - D(a, n) / (D(a, p) + m))                                 D the distance, not squared
    J_g = Var(d+) + Var(d-) + λ max(0, mean d+ - mean d- + t)                 d± = D² / 4, over the triplets of the batch
    L   = w_triplet mean J_t + w_global J_g
    e   = share of an epoch's triplets with J_t > 0;   κ = α e_target + β, with α <= 0, β fitted to the last (e, κ)

Lists: the paper makes them with FANNG, a graph whose edge v -> w is dropped if v has an edge to some u with d(v, u) < d(v, w)
and d(u, w) < d(v, w). That is the rule by which HNSW shrinks its lists of links and NSG prunes its edges, taken in ascending
order of d(v, ·); the engines `hnsw` and `nsg` are today's form of it. What the method needs are the lists: by default they
are exact. `lists: approximate` takes them from the index of the mining server, with its recall in the log.

What the paper leaves open, and what is done: T = 1 triplet an anchor and epoch, batches of 64; κ starts on the line through
(0, κ_max) and (1, κ_min), which stays in every fit with a small weight; κ is kept within [1, 64]; `lambda`, both weights: 0.8,
1, 1. A list without a positive gives a random triplet; ties by sample id; an image that is alone in its class is a negative
only; where a class has no image outside the list, any other of its positives is taken. D = √(D² + 1e-12).
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor

from methods.base import Batch, Context, Method, MethodConfig
from methods.config import Length
from methods.mining import MiningRequirements
from methods.optim import OptimizerConfig, ScheduleConfig
from methods.plans import Plan
from methods.random_streams import Stream
from methods.smart_mining_rule import ClassIndex, Triplets, mine_triplets

_IMAGES_PER_PASS = 2**18  # images embedded by one call of `embed_samples`
_ROWS_PER_PUT = 4096  # rows sent to the mining server by one call


class SmartMiningConfig(MethodConfig):
    name: Literal["smart_mining"] = "smart_mining"
    embedding_dim: int = Field(64, ge=1, description="D: dimension of the embedding")
    triplets_per_batch: int = Field(64, ge=1, description="B: a batch has 3 B images")
    triplets_per_anchor: int = Field(1, ge=1, description="T: triplets of each anchor in an epoch")
    anchors: int | None = Field(None, ge=1, description="number of random anchors in an epoch; none: all images")
    list_length: int = Field(1000, ge=2, description="K: length of each anchor's neighbour list (at most all images)")
    lists: Literal["exact", "approximate"] = Field(
        "exact", description="neighbour lists from an exact search | from the index of mining.engine"
    )
    positives: Literal["list", "class"] = Field(
        "list", description="positives in the list | all of the class, however far, up to K"
    )
    random_epochs: int = Field(2, ge=0, description="epochs of random triplets before mining starts")
    mined_share: float = Field(1.0, ge=0, le=1, description="ρ: share of mined triplets in a batch; others are random")
    adaptive: bool = Field(True, description="adapt κ after each epoch to reach target_error; false: κ is constant")
    kappa: float | None = Field(None, gt=0, description="κ of the first mined epoch (none: from the prior line)")
    target_error: float = Field(
        0.6, ge=0, le=1, description="e_target: share of triplets with a loss above 0 that κ is adapted to"
    )
    kappa_min: float = Field(1.0, gt=0, description="smallest κ")
    kappa_max: float = Field(64.0, gt=0, description="largest κ")
    window: int = Field(5, ge=1, description="number of past epochs that the line of error over κ is fitted to")
    prior_weight: float = Field(0.1, ge=0, description="weight of each of the prior line's two points in the fit")
    margin: float = Field(0.2, gt=0, description="m: margin of the triplet loss")
    global_margin: float = Field(0.01, ge=0, description="t: margin of the global loss")
    lam: float = Field(0.8, ge=0, description="λ: weight of the means in the global loss")
    w_triplet: float = Field(1.0, ge=0, description="weight of the triplet loss")
    w_global: float = Field(1.0, ge=0, description="weight of the global loss")
    optimizer: OptimizerConfig = OptimizerConfig(
        name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, head_lr_multiplier=10,
        schedule=ScheduleConfig(kind="step", every=Length(value=3, unit="epochs"), gamma=0.5),
    )  # fmt: skip

    @property
    def is_class_balanced(self) -> bool:
        return False

    @property
    def mining(self) -> MiningRequirements | None:
        return MiningRequirements(table=True, neighbours=self.list_length) if self.mined_share else None

    @model_validator(mode="after")
    def _check(self) -> SmartMiningConfig:
        plain = MethodConfig.model_fields
        for name in ("classes_per_batch", "samples_per_class"):
            if getattr(self, name) != plain[name].default:
                raise ValueError(
                    f"smart_mining trains on triplets, not on classes × images: set triplets_per_batch, leave out {name}"
                )
        if self.kappa_min > self.kappa_max:
            raise ValueError(f"kappa_min {self.kappa_min:g} is above kappa_max {self.kappa_max:g}")
        if not self.adaptive and self.kappa is None:
            raise ValueError("adaptive is off: set kappa")
        return self


# ---- the losses ------------------------------------------------------------------------------------------------------


def triplet_loss(
    anchor: Float[Tensor, "b dim"], positive: Float[Tensor, "b dim"], negative: Float[Tensor, "b dim"], margin: float
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """J_t of every triplet (eq. 2), and D²(a, p), D²(a, n)."""
    d_positive = (anchor - positive).square().sum(1)
    d_negative = (anchor - negative).square().sum(1)
    ratio = (d_negative + 1e-12).sqrt() / ((d_positive + 1e-12).sqrt() + margin)
    return torch.relu(1 - ratio), d_positive, d_negative


def global_loss(
    d_positive: Float[Tensor, " b"], d_negative: Float[Tensor, " b"], margin: float, lam: float
) -> Float[Tensor, ""]:
    """J_g (eq. 3; Kumar B G, Carneiro, Reid, CVPR 2016) of squared distances, with biased variances."""
    d_positive, d_negative = d_positive / 4, d_negative / 4
    spread = d_positive.var(correction=0) + d_negative.var(correction=0)
    return spread + lam * torch.relu(d_positive.mean() - d_negative.mean() + margin)


# ---- the controller --------------------------------------------------------------------------------------------------


class Controller:
    """Sets κ so that an epoch errs as often as it should: κ = α e + β, fitted to the last epochs (eqs. 7 and 8).

    Attributes:
        history: (e, κ) of the last mined epochs.
        alpha, beta: Slope and intercept of the newest fit.
        kappa: κ for the next epoch.
        pinned: Number of consecutive epochs in which κ was at an end of its range.
    """

    def __init__(self, config: SmartMiningConfig) -> None:
        c = self.config = config
        self.history: list[tuple[float, float]] = []
        self.alpha = c.kappa_min - c.kappa_max
        self.beta = c.kappa_max
        self.pinned = 0
        self.kappa = c.kappa if c.kappa is not None else self._clip_kappa(self.alpha * c.target_error + self.beta)

    def update(self, error: float) -> None:
        """Records the share of the epoch's triplets that had a gradient at the present κ, and sets the next κ."""
        c = self.config
        self.history = [*self.history, (error, self.kappa)][-c.window :]
        if not c.adaptive:
            return
        self.fit()
        unclipped = self.alpha * c.target_error + self.beta
        self.kappa = self._clip_kappa(unclipped)
        self.pinned = self.pinned + 1 if self.kappa != unclipped else 0
        if self.pinned == 3:
            warnings.warn(
                f"kappa has been at the end of its range, {self.kappa:g}, for 3 epochs (error of the last: {error:.2f}): "
                f"target_error {c.target_error:g} cannot be reached; change target_error, kappa_min or kappa_max",
                stacklevel=2,
            )

    def fit(self) -> None:
        """Weighted least squares; a positive slope (harder triplets err less) is implausible: the last slope is kept then."""
        c = self.config
        prior = [(0.0, c.kappa_max), (1.0, c.kappa_min)]
        e, k = np.array(prior + self.history).T
        w = np.array([c.prior_weight] * 2 + [1.0] * len(self.history))
        if w.sum() == 0:
            return
        e_mean, k_mean = (w * e).sum() / w.sum(), (w * k).sum() / w.sum()
        spread = (w * (e - e_mean) ** 2).sum()
        slope = (w * (e - e_mean) * (k - k_mean)).sum() / spread if spread > 1e-12 else 1.0
        if slope <= 0:
            self.alpha = float(slope)
        self.beta = float(k_mean - self.alpha * e_mean)

    def _clip_kappa(self, kappa: float) -> float:
        return min(self.config.kappa_max, max(self.config.kappa_min, kappa))

    def state(self) -> Float64[Tensor, " numbers"]:
        numbers = [self.alpha, self.beta, self.kappa, float(self.pinned)]
        return torch.tensor(numbers + [x for pair in self.history for x in pair], dtype=torch.float64)

    def load(self, state: Float64[Tensor, " numbers"]) -> None:
        values = state.tolist()
        self.alpha = values[0]
        self.beta = values[1]
        self.kappa = values[2]
        self.pinned = int(values[3])
        self.history = list(zip(values[4::2], values[5::2], strict=True))


def _anchors(
    labels: Int64[np.ndarray, " samples"], sizes: Int64[np.ndarray, " classes"]
) -> Int64[np.ndarray, " anchors"]:
    """The samples with another of their class.

    Raises:
        ValueError: There are none, or there is a single class.
    """
    anchors = np.flatnonzero(sizes[labels] > 1)
    if len(anchors) == 0 or len(np.flatnonzero(sizes)) < 2:
        raise ValueError(
            "triplets need at least two classes, and a class with at least two images: prepare more images"
        )
    return anchors


# ---- the method ------------------------------------------------------------------------------------------------------


class SmartMining(Method):
    Config = SmartMiningConfig
    plan_is_stored = True
    counts: Tensor

    def __init__(self, config: SmartMiningConfig, features: int, num_classes: int) -> None:
        super().__init__(config, features, num_classes)
        self.controller = Controller(config)
        self.register_buffer(
            "counts", torch.zeros(2, dtype=torch.int64)
        )  # triplets with a gradient, and all, of the epoch
        self.list_statistics = [1.0, 0.0, 0.0]  # recall of the lists, shares without a positive, without a negative
        self.seconds: dict[str, float] = {}  # of the last mining

    def get_extra_state(self) -> Tensor:
        return torch.cat([torch.tensor(self.list_statistics, dtype=torch.float64), self.controller.state()])

    def set_extra_state(self, state: Tensor) -> None:
        self.list_statistics = state[:3].tolist()
        self.controller.load(state[3:].double())

    def epoch_shape(self, context: Context) -> tuple[int, int]:
        """As that of any epoch's plan, which is mined for."""
        c = self.config
        anchors = len(_anchors(context.labels, np.bincount(context.labels)))
        triplets = min(anchors, c.anchors or anchors) * c.triplets_per_anchor
        return -(-triplets // c.triplets_per_batch), 3 * c.triplets_per_batch

    def plan(self, epoch: int, context: Context) -> Plan:
        """Triplets of all anchors in random order: slots of anchors, of positives, of negatives, with their kind."""
        c = self.config
        classes = ClassIndex(context.labels, (context.seed, epoch, Stream.SMART_MINING_TRIPLETS))
        random = np.random.default_rng([context.seed, epoch, Stream.SMART_MINING_ORDER])
        anchors = _anchors(classes.labels, classes.sizes)
        if c.anchors is not None:
            anchors = np.sort(random.permutation(anchors)[: c.anchors])
        random_triplets = classes.random_triplets(
            np.repeat(anchors, c.triplets_per_anchor), np.tile(np.arange(c.triplets_per_anchor), len(anchors))
        )
        triplets = self._mine(epoch, anchors, classes, context) if self._mines(epoch) else random_triplets
        order = random.permutation(len(random_triplets.anchor))
        order = np.resize(order, -(-len(order) // c.triplets_per_batch) * c.triplets_per_batch)
        order = order.reshape(-1, c.triplets_per_batch)
        is_mined_slot = np.arange(c.triplets_per_batch) < round(c.mined_share * c.triplets_per_batch)
        anchor, positive, negative, kind = (
            np.where(is_mined_slot, a[order], b[order]) for a, b in zip(triplets, random_triplets, strict=True)
        )
        roles = np.repeat(np.array(["anchor", "positive", "negative"]), c.triplets_per_batch)
        ids = np.concatenate([anchor, positive, negative], 1)
        return Plan(ids, {"role": np.broadcast_to(roles, ids.shape), "kind": np.tile(kind.astype(np.int8), 3)})

    def _mines(self, epoch: float | int) -> bool:
        return epoch >= self.config.random_epochs and self.config.mined_share > 0

    def _mine(self, epoch: int, anchors: np.ndarray, classes: ClassIndex, context: Context) -> Triplets:
        """Embeds all images, lists their neighbours, and takes triplets from the lists."""
        c, mining = self.config, context.mining
        assert mining is not None
        tag = f"epoch {epoch}, weights {context.weights_hash()}"
        started_at = time.perf_counter()
        all_ids, count = np.arange(len(context.labels)), len(context.labels)
        for first in range(0, count, _IMAGES_PER_PASS):
            ids = all_ids[first : first + _IMAGES_PER_PASS]
            embeddings = context.embed_samples(ids)
            for start in range(0, len(ids), _ROWS_PER_PUT):
                rows = slice(start, start + _ROWS_PER_PUT)
                row_ids = torch.from_numpy(ids[rows])
                mining.put(row_ids, embeddings[rows], torch.from_numpy(context.labels[ids[rows]]), tag)
        embedded_at = time.perf_counter()
        k = min(c.list_length, count - 1)
        is_anchor = None if c.anchors is None else np.isin(all_ids, anchors)
        class_filter: Literal["all", "other"] = "all"
        positives = None
        if c.positives == "class":
            class_filter = "other"
            own_ids, own_lists, _ = mining.all_neighbours(min(k, int(classes.sizes.max()) - 1), "same", None, tag)
            positives = own_ids, own_lists[0]
        rule = functools.partial(
            mine_triplets,
            classes=classes,
            kappa=self.controller.kappa,
            count=c.triplets_per_anchor,
            is_anchor=is_anchor,
            positives=positives,
        )
        _, blocks, recall = mining.all_neighbours(k, class_filter, rule, tag, c.lists == "approximate")
        listed_at = time.perf_counter()
        block_triplets = [b.triplets for b in blocks]
        anchor = np.concatenate([p.anchor for p in block_triplets])
        order = np.argsort(anchor, kind="stable")  # blocks come in the order of the table
        triplets = Triplets(*(np.concatenate(column)[order] for column in zip(*block_triplets, strict=True)))
        num_lists = max(1, len(anchors))
        self.list_statistics = [
            recall,
            sum(b.without_positive for b in blocks) / num_lists,
            sum(b.without_negative for b in blocks) / num_lists,
        ]
        rule_s = sum(b.seconds for b in blocks)
        self.seconds = {"sweep": embedded_at - started_at, "lists": listed_at - embedded_at - rule_s, "rule": rule_s}
        return triplets

    def on_epoch_end(self, epoch: int, context: Context, metrics: Mapping[str, float] | None) -> None:
        if self._mines(epoch):
            self.controller.update(float(self.counts[0]) / max(1, int(self.counts[1])))
        self.counts.zero_()

    def training_step(self, batch: Batch, context: Context) -> dict[str, float]:
        c = self.config
        anchor, positive, negative = self.embed(context.encode()).chunk(3)
        triplet, d_positive, d_negative = triplet_loss(anchor, positive, negative, c.margin)
        global_term = global_loss(d_positive, d_negative, c.global_margin, c.lam)
        loss = c.w_triplet * triplet.mean() + c.w_global * global_term
        context.backward(loss)
        context.step("main")
        active = triplet.detach() > 0
        self.counts += torch.stack([active.sum(), torch.tensor(len(active), device=active.device)]).to(
            self.counts.device
        )
        kind = batch.columns["kind"][: len(active)]
        logs = {"loss": float(loss.detach()), "triplet": float(triplet.detach().mean()), "global": float(global_term.detach()),
                "error": float(self.counts[0]) / float(self.counts[1])}  # fmt: skip
        logs |= {f"share/{n}": float((kind == k).mean()) for k, n in enumerate(("mined", "half_mined", "random"))}
        if self._mines(context.clock.epoch):
            controller = self.controller
            logs |= {
                "kappa": controller.kappa,
                "alpha": controller.alpha,
                "beta": controller.beta,
                "pinned_epochs": float(controller.pinned),
            }
            names = ("recall", "lists_without_positive", "lists_without_negative")
            logs |= {f"lists/{n}": v for n, v in zip(names, self.list_statistics, strict=True)}
            logs |= {f"seconds/{n}": s for n, s in self.seconds.items()}
        return logs


__all__ = ["SmartMining", "SmartMiningConfig"]
