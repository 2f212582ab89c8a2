"""MMSI: its plans and its config."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methods.mmsi import Mmsi, MmsiConfig
from methods.plans import Plan
from tests.methods.context import FakeContext

# ---- plans -----------------------------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 5, 8, 5, 5, 20, 2, 7, 5]


def plans(epochs: int, **config: Any) -> tuple[np.ndarray, list[Plan]]:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    values = {"classes_per_batch": 4, "samples_per_class": 3, "meta_classes": 3} | config
    method = Mmsi(MmsiConfig(**values), 5, len(SIZES))
    context = FakeContext(method)
    context.labels, context.seed = labels, 5
    return labels, [method.plan(epoch, context) for epoch in range(epochs)]


def test_plan() -> None:
    """Every class once an epoch, repeats only in small classes; meta images pass over all classes, without regard to epochs."""
    labels, found = plans(30)
    meta, left_out = [], set()
    for plan in found:
        assert plan.ids.shape == (2, 15) and (plan.columns["role"] == ["train"] * 12 + ["meta"] * 3).all()
        groups = plan.ids[:, :12].reshape(8, 3)
        classes = labels[groups]
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0])) == 8
        left_out |= set(range(11)) - set(classes[:, 0])
        for group, c in zip(groups, classes[:, 0], strict=True):
            assert len(set(group)) == 3 or SIZES[c] < 3
        meta += list(labels[plan.ids[:, 12:]])
    assert left_out == set(range(11))
    for start in range(0, 60, 3):  # a pass: 3 steps of 3 classes out of 11
        assert len(set(np.concatenate(meta[start : start + 3]))) == 9
    assert set(np.concatenate(meta)) == set(range(11))
    assert np.array_equal(plans(3)[1][2].ids, found[2].ids) and not np.array_equal(found[0].ids, found[1].ids)


def test_plan_with_images_held_out() -> None:
    labels, found = plans(40, meta_source="holdout", meta_share=0.2)
    trained = {i for plan in found for i in plan.ids[:, :12].ravel().tolist()}
    held = {i for plan in found for i in plan.ids[:, 12:].ravel().tolist()}
    assert not trained & held and len(trained | held) == len(labels)
    assert np.bincount(labels[list(held)]).tolist() == [0, 1, 1, 1, 2, 1, 1, 4, 1, 1, 1]


def test_plan_refuses_batches_of_more_classes_than_there_are() -> None:
    with pytest.raises(ValueError, match="batches of 12 classes, but the training set has 11"):
        plans(1, classes_per_batch=12)
    with pytest.raises(ValueError, match="meta_classes is 12, but the meta images have 11 classes"):
        plans(1, meta_classes=12)


def test_config() -> None:
    with pytest.raises(ValueError, match="a triplet's weight has no sign"):
        MmsiConfig(loss="triplet", norm_scope="per_sign")
    with pytest.raises(ValueError, match="weighting gradient is for losses of pairs"):
        MmsiConfig(loss="triplet", weighting="gradient")
    needs = MmsiConfig(memory_per_class=7, memory_total=70).mining
    assert needs is not None and (needs.table, needs.per_class, needs.total) == (False, 7, 70)
