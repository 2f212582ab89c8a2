"""Baseline beyond the batch: cross-batch memory and hard negatives of the whole training set, against plain lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, CrossBatchMemory, ThresholdConsistentMarginLoss
from torch import Tensor

from methods import Batch, plugins
from methods.baseline import Baseline, BaselineConfig
from methods.config import Clock
from methods.metric_learning import References, build_loss, build_miner, evaluate_loss
from pipeline.distributed.collectives import Ranks
from pipeline.mining.messages import ServerSpec
from pipeline.mining.method_view import MethodMining
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport
from pipeline.storage import Folder
from tests.methods.context import FakeContext

SAMPLES, DIM, FEATURES = 40, 6, 9
LABELS = np.arange(SAMPLES) % 8


class MiningContext(FakeContext):
    """With a real server in this process."""

    def __init__(self, method: Baseline, folder: Path) -> None:
        super().__init__(method)
        self.labels = LABELS
        needs = method.config.mining
        assert needs is not None
        spec = ServerSpec("run", DIM, per_class=needs.per_class, total=needs.total)
        self.mining = MethodMining(needs, spec, [LocalTransport(MiningServer())], Ranks(), self.device, Folder(folder))
        self.mining.begin(1, None)


def train(folder: Path, batches: list[np.ndarray], **config: Any) -> Iterator[tuple[int, Tensor, dict[str, float]]]:
    """Every step's embeddings (of the untouched head) and logs."""
    torch.manual_seed(0)
    values = {"loss": "ContrastiveLoss", "optimizer": {"name": "sgd", "lr": 1e-12}} | config
    method = Baseline(BaselineConfig(embedding_dim=DIM, **values), FEATURES, 8).double()
    context = MiningContext(method, folder)
    features = torch.randn(len(batches), len(batches[0]), FEATURES, dtype=torch.float64)
    for step, ids in enumerate(batches):
        context.clock, context.mining.step, context.features = Clock(step, step / 5), step, features[step]
        context.next_ids = batches[step + 1] if step + 1 < len(batches) and step % 4 != 3 else None
        embeddings = method.embed(features[step]).detach()
        logs = method.training_step(Batch(torch.from_numpy(ids), torch.from_numpy(LABELS[ids]), {}), context)
        yield step, embeddings, logs
    context.mining.close()


@pytest.fixture
def batches() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.choice(SAMPLES, 8, replace=False) for _ in range(12)]


def test_cross_batch_memory(batches: list[np.ndarray], tmp_path: Path) -> None:
    """The batch and the last 20 embeddings before it, oldest out first; as the library's memory, which is given the batch first."""
    loss, seen = ContrastiveLoss(), list[tuple[Tensor, int]]()
    for step, z, logs in train(tmp_path, batches, memory=20, memory_start="2 steps", memory_weight=0.5):
        labels = torch.from_numpy(LABELS[batches[step]])
        expected = float(loss(z, labels))
        assert logs["batch"] == pytest.approx(expected, rel=1e-9)
        if step < 2:
            assert "memory" not in logs
        else:
            kept = seen[-20:]
            others, classes = torch.stack([f for f, _ in kept]).double(), torch.tensor([y for _, y in kept])
            library = CrossBatchMemory(loss, DIM, memory_size=len(kept) + len(z)).double()
            library.add_to_memory(others, classes, len(kept))
            term = 0.5 * float(library(z, labels))
            assert term > 0.01 and logs["memory"] == pytest.approx(term, rel=1e-9)
            expected += term
        assert logs["loss"] == pytest.approx(expected, rel=1e-9)
        seen += [(f.float(), int(y)) for f, y in zip(z, labels, strict=True)]


def test_hard_negatives_of_the_whole_training_set(batches: list[np.ndarray], tmp_path: Path) -> None:
    """Nearest rows of other classes by the stored embeddings of the batch, as they were one step before (where prefetched)."""
    loss, table, before = ContrastiveLoss(), dict[int, Tensor](), dict[int, Tensor]()
    compared = 0
    for step, z, logs in train(tmp_path, batches, hard_negatives=3, hard_weight=1.0):
        ids = batches[step]
        stored = table if step % 4 == 0 else before  # the first step of an epoch asks at once
        chosen: set[int] = set()
        for i in [int(i) for i in ids if int(i) in stored]:
            others = sorted(
                (float((stored[i] - v).double().square().sum()), j) for j, v in stored.items() if LABELS[j] != LABELS[i]
            )
            chosen |= {j for _, j in others[:3]}
        if chosen:
            negatives = torch.stack([stored[j] for j in sorted(chosen)]).double()
            classes = torch.from_numpy(LABELS[sorted(chosen)])
            labels = torch.from_numpy(LABELS[ids])
            same = labels[:, None] == labels[None]
            positive = (same & ~torch.eye(len(z), dtype=torch.bool)).nonzero(as_tuple=True)
            anchors, far = (labels[:, None] != classes[None]).nonzero(as_tuple=True)
            pairs = (*positive, anchors, far + len(z))
            references = {"ref_emb": torch.cat([z, negatives]), "ref_labels": torch.cat([labels, classes])}
            term = float(loss(z, labels, pairs, **references))
            assert logs["hard"] == pytest.approx(term, rel=1e-6)
            compared += 1
        else:
            assert "hard" not in logs
        before = dict(table)
        table |= {int(i): f.float() for i, f in zip(ids, z, strict=True)}
    assert compared >= 9


PAIR_LOSSES = [
    "NTXentLoss", "SupConLoss", "CircleLoss", "MarginLoss", "LiftedStructureLoss", "GeneralizedLiftedStructureLoss", "TupletMarginLoss",
    "TripletMarginLoss", "MultiSimilarityLoss", "ContrastiveLoss", "IntraPairVarianceLoss", "DynamicSoftMarginLoss",
]  # fmt: skip


@pytest.mark.parametrize("classes", [11_318, 694])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_every_row_has_a_gradient_from_hard_negatives(name: str, classes: int) -> None:
    """24 x 4 rows whose neighbours are of as many classes as a large dataset has; 4 of the 96 rows had one before."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(np.repeat(random.choice(classes, 24, replace=False), 4))
    others = torch.from_numpy(random.choice(classes, 4 * 96))
    z = torch.nn.functional.normalize(torch.randn(96, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    hard = torch.nn.functional.normalize(torch.randn(len(others), 16, generator=torch.Generator().manual_seed(1)))
    loss = build_loss(name, {}, classes, 16)
    evaluate_loss(loss, None, z, labels, References.of(z, labels, hard, others, negatives_only=True)).backward()
    assert z.grad is not None
    assert int((z.grad.norm(dim=1) > 0).sum()) >= (90 if name != "TripletMarginLoss" else 60)


def test_who_is_compared_with_whom() -> None:
    labels, others = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])
    make = lambda only: References.of(torch.randn(3, 2), labels, torch.randn(3, 2), others, only)  # noqa: E731
    positive, negative = make(True).pairs(labels)
    assert positive.int().tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert negative.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    positive, negative = make(False).pairs(labels)
    assert positive.int().tolist() == [[0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]
    assert negative.int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    "miner", ["MultiSimilarityMiner", "TripletMarginMiner", "BatchHardMiner", "BatchEasyHardMiner"]
)
def test_a_miners_choice_keeps_to_them(miner: str) -> None:
    labels, others = torch.arange(12) // 3, torch.arange(20) % 7
    batch, hard = torch.randn(12, 4), torch.randn(20, 4)
    for only in (True, False):
        references = References.of(batch, labels, hard, others, only)
        positive, negative = references.pairs(labels)
        chosen = references.tuples(build_miner(miner, {}), batch, labels)
        if len(chosen) == 3:
            chosen = (chosen[0], chosen[1], chosen[0], chosen[2])
        assert bool(positive[chosen[0], chosen[1]].all()) and bool(negative[chosen[2], chosen[3]].all())


@pytest.mark.parametrize("name", ["NCALoss", "AngularLoss"])
@pytest.mark.parametrize("key", ["memory", "hard_negatives"])
def test_losses_that_look_at_labels_alone_are_refused(name: str, key: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"{name} cannot be used with {key}: it takes its pairs from the labels.* such as ContrastiveLoss",
    ):
        BaselineConfig(loss=name, **{key: 4})  # type: ignore[arg-type]


def test_a_loss_that_indexes_the_batch_by_references_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ThresholdConsistentMarginLoss with \{\} fails on a batch of random embeddings: index"
    ):
        BaselineConfig(loss="ThresholdConsistentMarginLoss", memory=10)


def test_a_library_in_the_users_folder_is_not_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = next(p for p in Path(pytorch_metric_learning.__file__).parents if p.name == "site-packages")
    monkeypatch.setenv(plugins.FOLDERS, str(packages.parent))  # as a project with an environment in it
    assert not plugins.is_own(ThresholdConsistentMarginLoss)
    monkeypatch.setenv(plugins.FOLDERS, str(Path(plugins.__file__).parent))
    assert plugins.is_own(Baseline) and not plugins.is_own(ThresholdConsistentMarginLoss)


def test_losses_that_cannot_be_compared_with_others_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ProxyAnchorLoss with \{\} fails on a batch of random embeddings"):
        BaselineConfig(loss="ProxyAnchorLoss", memory=10)
    assert BaselineConfig(loss="ProxyAnchorLoss").mining is None
    needs = BaselineConfig(memory=10, hard_negatives=4).mining
    assert needs is not None and (needs.total, needs.per_class, needs.table, needs.neighbours) == (10, None, True, 4)
