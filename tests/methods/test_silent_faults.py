"""Settings that would train nothing, or not what they say, are refused or told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods import METHODS
from methods.baseline import Baseline, BaselineConfig
from methods.gca_hng import GcaHngConfig
from methods.intra_batch import IntraBatchConfig
from methods.mmsi import Mmsi, MmsiConfig
from methods.mmsi_weights import meta_loss
from methods.osm_caa import OsmCaaConfig, soft_mining_loss, squared_distances
from methods.plans import class_balanced, combine_sampler, number_sampler, uniform_classes
from pipeline.mining.memory import EmbeddingMemory


@dataclass
class Entries:
    """A memory that is a list."""

    features: Tensor
    labels: Tensor
    ids: Tensor

    @property
    def classes(self) -> set[int]:
        return set(self.labels.tolist())


@pytest.mark.parametrize(("total", "fits"), [(60, False), (115, False), (116, True), (None, True)])
def test_a_memory_that_never_holds_the_classes_of_the_warm_up(total: int | None, fits: bool) -> None:
    """5 images of each class: 24 of 30 classes besides the 6 of the batch have to be held."""
    config = MmsiConfig(
        memory_total=total, warmup_classes=30, classes_per_batch=6, samples_per_class=5, embedding_dim=4
    )
    if fits:
        assert Mmsi(config, 8, 100).warmup == 30
    else:
        with pytest.raises(
            ValueError,
            match=r"memory_total is \d+, which holds \d+ classes of 5 images.* set memory_total to 120 or more",
        ):
            Mmsi(config, 8, 100)
    assert Mmsi(config, 8, 10).warmup == 10, "all classes are enough"
    one = config.model_copy(update={"memory_per_class": 1, "memory_total": 24})
    assert Mmsi(one, 8, 100).warmup == 30, "one entry of each class: 24 classes, and 6 of the batch"


@pytest.mark.parametrize("total", [10, 23, 60, 118, 120])
@pytest.mark.parametrize("per_class", [1, 3, 5, 100])
def test_that_bound_is_what_a_memory_holds(total: int, per_class: int) -> None:
    """The real memory: the most classes that it has ever held, and the batch's own."""
    memory, most = EmbeddingMemory(2, per_class, total), 0
    for epoch in range(4):
        for batch in np.random.default_rng(epoch).permutation(60).reshape(-1, 6):
            most = max(most, len(set(memory.classes) | set(batch.tolist())))
            ids = (batch[:, None] * 5 + np.arange(5)).ravel()
            memory.append(torch.zeros(30, 2), torch.from_numpy(np.repeat(batch, 5)), torch.from_numpy(ids))
    bound = -(-total // min(5, per_class)) + 6
    assert min(bound, 60) - 6 <= most <= bound
    sizes = {
        "classes_per_batch": 6,
        "samples_per_class": 5,
        "embedding_dim": 4,
        "memory_per_class": per_class,
        "memory_total": total,
    }
    Mmsi(MmsiConfig(warmup_classes=bound, **sizes), 8, 1000)
    with pytest.raises(ValueError, match="memory_total"):
        Mmsi(MmsiConfig(warmup_classes=bound + 1, **sizes), 8, 1000)


def test_reasons_of_skipped_steps() -> None:
    method = Mmsi(MmsiConfig(embedding_dim=4), 8, 100)
    method.skipped[0] += 3
    assert method.skipped_steps == {
        "the memory held fewer classes than warmup_classes": 3, "the meta loss was zero": 0, "no pair had a weight above zero": 0
    }  # fmt: skip
    assert Baseline(BaselineConfig(embedding_dim=4), 8, 3).skipped_steps == {}


def test_a_meta_image_without_positives_or_without_negatives_does_not_count() -> None:
    """Of the multi-similarity meta loss: images 0 and 1 have both, 2 no positive, 3 no negative but it is of the only class left."""
    config = MmsiConfig(loss="multi_similarity", embedding_dim=3, margin=None)
    generator = torch.Generator().manual_seed(0)
    unit = lambda n: nn.functional.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64))  # noqa: E731
    features, memory_labels = unit(6), torch.tensor([0, 0, 0, 1, 1, 1])
    memory = Entries(features, memory_labels, torch.arange(6))
    z, labels, ids = unit(3), torch.tensor([0, 1, 7]), torch.tensor([100, 101, 102])
    with_it = meta_loss(z, labels, ids, memory, config)
    without = meta_loss(z[:2], labels[:2], ids[:2], memory, config)
    assert float(with_it) == pytest.approx(float(without) * 2 / 3, rel=1e-12), "no positive: adds nothing to the sum"
    only = Entries(features[:3], memory_labels[:3], torch.arange(3))
    assert float(meta_loss(z[:1], labels[:1], ids[:1], only, config)) == 0, "no negative"


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("intra_batch", {"optimizer": {"loss_lr_multiplier": 10}}, "loss_lr_multiplier is 10, but this optimizer has no parameters of the loss"),
        ("baseline", {"loss": "ContrastiveLoss", "optimizer": {"loss_lr_multiplier": 10}}, "no parameters of the loss"),
        ("mmsi", {"optimizer": {"loss_lr_multiplier": 10}}, "no parameters of the loss"),
        ("smart_mining", {"optimizer": {"loss_lr_multiplier": 10}}, "no parameters of the loss"),
        ("gca_hng", {"graph_optimizer": {"loss_lr_multiplier": 10}}, "no parameters of the loss"),
        ("gca_hng", {"graph_optimizer": {"head_lr_multiplier": 10}}, "no parameters of the head"),
    ],
)  # fmt: skip
def test_rates_of_parameters_that_do_not_exist(name: str, changes: dict[str, Any], says: str) -> None:
    kind = METHODS[name]
    config = kind.Config.model_validate({"name": name, "embedding_dim": 8, **changes})
    with pytest.raises(ValueError, match=says):
        kind(config, 6, 20).optimizers(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (BaselineConfig(loss="ProxyAnchorLoss"), 100),
        (BaselineConfig(loss="SoftTripleLoss"), 100),
        (BaselineConfig(loss="ArcFaceLoss", optimizer={"loss_lr_multiplier": 3}), 3),
        (BaselineConfig(loss="ContrastiveLoss"), 1),
        (BaselineConfig(loss="MarginLoss", loss_args={"learn_beta": True}), 1),
        (GcaHngConfig(base_loss="proxy_anchor"), 100),
        (GcaHngConfig(), 1),
        (IntraBatchConfig(), 1),
    ],
)
def test_proxies_learn_faster_by_default(config: Any, rate: float) -> None:
    """And the configuration that is recorded says so."""
    assert config.optimizer.loss_lr_multiplier == rate
    assert config.model_dump(mode="json")["optimizer"]["loss_lr_multiplier"] == rate
    assert type(config).model_validate(config.model_dump(mode="json")).optimizer.loss_lr_multiplier == rate


def test_max_repeats_is_for_class_balanced_batches() -> None:
    for name in ("mmsi", "smart_mining", "gca_hng", "intra_batch"):
        with pytest.raises(ValueError, match="max_repeats is for class-balanced batches"):
            METHODS[name].Config(name=name, max_repeats=3.0)
    assert IntraBatchConfig(sampler="balanced", max_repeats=3.0).max_repeats == 3


def test_heads_divide_the_dimension() -> None:
    for config in (GcaHngConfig, IntraBatchConfig):
        with pytest.raises(ValueError, match=r"heads is 4, embedding_dim 30|30.*4"):
            config(heads=4, embedding_dim=30)


def test_gradients_of_images_that_are_very_close() -> None:
    """1e-4 apart in float32: 3 % off where distances are 2 - 2 cos."""
    base = nn.functional.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    step = 1e-4 * nn.functional.normalize(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)))
    z = nn.functional.normalize(base + step)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    found = []
    for dtype in (torch.float32, torch.float64):
        x = z.detach().clone().to(dtype).requires_grad_()
        soft_mining_loss(x, labels, None, OsmCaaConfig(embedding_dim=64)).loss.backward()
        assert x.grad is not None
        found.append(x.grad.double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4
    exact = (z.double()[:, None] - z.double()[None]).square().sum(-1)
    torch.testing.assert_close(squared_distances(z).double(), exact, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("make", [class_balanced, combine_sampler, number_sampler, uniform_classes])
def test_labels_with_gaps_are_told(make: Any) -> None:
    with pytest.raises(ValueError, match="labels are 3 classes numbered up to 4, without 1: number them 0, 1, 2"):
        make(np.repeat([0, 2, 4], 6), 2, 2, 0, 0)
