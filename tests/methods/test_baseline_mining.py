"""Baseline beyond the batch: cross-batch memory and hard negatives of the whole training set, against plain lists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from methods import Batch
from methods.baseline import Baseline, BaselineConfig
from methods.config import Clock
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
    """The last 20 embeddings before the batch, oldest out first."""
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
            term = 0.5 * float(loss(z, labels, ref_emb=others, ref_labels=classes))
            assert term > 0.01 and logs["memory"] == pytest.approx(term, rel=1e-9)
            expected += term
        assert logs["loss"] == pytest.approx(expected, rel=1e-9)
        seen += [(f.float(), int(y)) for f, y in zip(z, labels, strict=True)]


def test_hard_negatives_of_the_whole_training_set(batches: list[np.ndarray], tmp_path: Path) -> None:
    """Nearest rows of other classes by the stored embeddings of the batch, as they were one step before (where prefetched)."""
    loss, table, before = ContrastiveLoss(), dict[int, Tensor](), dict[int, Tensor]()
    compared = 0
    for step, z, logs in train(tmp_path, batches, hard_negatives=3):
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
            term = float(loss(z, torch.from_numpy(LABELS[ids]), ref_emb=negatives, ref_labels=classes))
            assert logs["hard"] == pytest.approx(term, rel=1e-6)
            compared += 1
        else:
            assert "hard" not in logs
        before = dict(table)
        table |= {int(i): f.float() for i, f in zip(ids, z, strict=True)}
    assert compared >= 9


def test_losses_that_cannot_be_compared_with_others_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ProxyAnchorLoss with \{\} fails on a batch of random embeddings"):
        BaselineConfig(loss="ProxyAnchorLoss", memory=10)
    assert BaselineConfig(loss="ProxyAnchorLoss").mining is None
    needs = BaselineConfig(memory=10, hard_negatives=4).mining
    assert needs is not None and (needs.total, needs.per_class, needs.table, needs.neighbours) == (10, None, True, 4)
