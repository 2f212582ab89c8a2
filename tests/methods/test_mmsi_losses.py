"""MMSI: every loss, pair by pair."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from methods.mmsi_weights import MmsiConfig, normalise_weights, select_pairs, weighted_loss
from tests.methods.test_mmsi import ALL, make_problem

# ---- every loss, pair by pair ----------------------------------------------------------------------------------------


def loop_loss(name: str, s: np.ndarray, w: np.ndarray | None, y: list[int], c: MmsiConfig) -> tuple[float, list[Any]]:
    """The formulas of the docstring, one anchor at a time; returns what has a weight, too."""
    n, total, slots = len(y), 0.0, []
    for i in range(n):
        near = [j for j in range(n) if j != i and y[j] == y[i]]
        far = [j for j in range(n) if y[j] != y[i]]
        if name == "triplet":
            for p in near:
                for q in far:
                    if s[i, q] - s[i, p] + c.constants.margin > 0:
                        slots.append((i, p, q))
                        total += max(
                            0.0, (1 if w is None else w[len(slots) - 1]) * (s[i, q] - s[i, p]) + c.constants.margin
                        )
            continue
        if name == "contrastive":
            far = [j for j in far if s[i, j] > c.constants.margin]
        elif c.constants.margin is not None:
            low, high = min((s[i, j] for j in near), default=np.inf), max((s[i, j] for j in far), default=-np.inf)
            near, far = (
                [j for j in near if high - s[i, j] + c.constants.margin > 0],
                [j for j in far if s[i, j] + c.constants.margin - low > 0],
            )
            if not near or not far:
                continue
        slots += [(i, j) for j in sorted(near + far)]
        ws = {j: s[i, j] * (1 if w is None else w[i, j]) for j in near + far}
        if name == "contrastive":
            total += sum((1 if w is None else w[i, j]) - ws[j] for j in near) + sum(ws[j] for j in far)
        elif name == "multi_similarity":
            total += 2 / c.beta * np.log1p(sum(np.exp(-c.beta * (ws[j] - c.base)) for j in near))
            total += 2 / c.alpha * np.log1p(sum(np.exp(c.alpha * (ws[j] - c.base)) for j in far))
        elif name == "lifted":
            total += 2 / c.beta * np.log(sum(np.exp(-c.beta * ws[j]) for j in near))
            total += 2 / c.alpha * np.log(sum(np.exp(c.alpha * ws[j]) for j in far))
        else:
            total += 2 / c.beta * sum(np.log1p(np.exp(-c.beta * (ws[j] - c.base))) for j in near) / max(1, len(near))
            total += 2 / c.alpha * sum(np.log1p(np.exp(c.alpha * (ws[j] - c.base))) for j in far) / max(1, len(far))
    return total / n, slots


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 2, 2, 3], [0] * 6, list(range(6)), [0, 0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("margin", [None, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_every_loss_pair_by_pair(name: str, margin: float | None, labels: list[int]) -> None:
    """Also of one class alone, of single images, of a class beside a single image."""
    random = np.random.default_rng(len(labels))
    x = random.standard_normal((len(labels), 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    c, s, y = (
        MmsiConfig(loss=cast(Any, name), margin=margin, alpha=5.0),
        torch.from_numpy(x @ x.T),
        torch.tensor(labels),
    )
    chosen = select_pairs(s, y, c)
    wanted, slots = loop_loss(name, s.numpy(), None, labels, c)
    assert float(weighted_loss(s, 1.0, chosen, c)) == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert int(chosen.slots.sum()) == len(slots)
    w = torch.zeros(chosen.slots.shape, dtype=torch.float64)
    w[chosen.slots] = torch.from_numpy(random.random(len(slots)))
    listed = w[chosen.slots].numpy() if name == "triplet" else w.numpy()
    assert float(weighted_loss(s, w, chosen, c)) == pytest.approx(
        loop_loss(name, s.numpy(), listed, labels, c)[0], rel=1e-12, abs=1e-12
    )
    if slots:
        s, w = s.requires_grad_(), w.requires_grad_()
        assert torch.autograd.gradcheck(lambda s, w: weighted_loss(s, w, chosen, c), (s, w))


def test_weights_per_sign() -> None:
    x, y, _, _ = make_problem()
    e = nn.functional.normalize(x)
    c = MmsiConfig(loss="contrastive", margin=-1.0)
    chosen = select_pairs(e @ e.T, y, c)
    u = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u[chosen.negatives] *= 1e-9
    joint, apart = normalise_weights(u, chosen), normalise_weights(u, chosen, "per_sign")
    assert float(joint.max()) == 1 and float(joint[chosen.negatives].max()) < 1e-8
    assert float(apart[chosen.positives].max()) == float(apart[chosen.negatives].max()) == 1
    assert bool((apart[u < 0] == 0).all()) and bool((apart[~chosen.slots] == 0).all())
    assert torch.equal(normalise_weights(-u.abs(), chosen), torch.zeros_like(u))
