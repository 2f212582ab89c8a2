"""OSM+CAA against the published formulas, evaluated pair by pair, and at the edges of what a batch can be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.osm_caa import OsmCaa, OsmCaaConfig, attention_pool, soft_mining_loss, weighted_cross_entropy
from tests.methods.context import FakeContext, make_batch

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "osm_caa_f64.npz")
PROBLEMS = ("small", "noneg")
LOGITS = {"paper_fnorm": "fnorm", "paper_fraw": "raw", "both_norm": "cosine", "caffe_logits": "raw"}
MODES = dict.fromkeys(LOGITS, "paper") | {"caffe_logits": "caffe"}


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDEN[key])


def make(features: int, classes: int, dim: int, **config: Any) -> OsmCaa:
    return OsmCaa(OsmCaaConfig(embedding_dim=dim, **config), features, classes).double()


@pytest.mark.parametrize("variant", LOGITS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_golden(problem: str, variant: str) -> None:
    """Loss, parts, weights and gradient; the classifier is not touched by the metric loss."""
    f = golden(f"{problem}/f").requires_grad_()
    labels, weight, bias = (golden(f"{problem}/{k}") for k in ("y", "W", "b"))
    config = OsmCaaConfig(caa_logits=LOGITS[variant], mode=MODES[variant])  # type: ignore[arg-type]
    method = make(f.shape[1], len(weight), f.shape[1], caa_logits=LOGITS[variant], mode=MODES[variant])
    with torch.no_grad():
        method.classifier.weight.copy_(weight)
        method.classifier.bias.copy_(bias if variant == "caffe_logits" else torch.zeros_like(bias))
    logits = method.logits(method.classifier, f)
    torch.testing.assert_close(logits, golden(f"{problem}/{variant}/logits"), rtol=1e-10, atol=1e-10)
    attention = method._attention(method._probability(logits, labels))
    torch.testing.assert_close(attention, golden(f"{problem}/{variant}/a"), rtol=1e-10, atol=1e-10)
    terms = soft_mining_loss(F.normalize(f), labels, attention, config)
    for name, got in {"loss": terms.loss, "L_P": terms.positive, "L_N": terms.negative, "w": terms.weights}.items():
        wanted = golden(f"{problem}/{variant}/{name}")
        torch.testing.assert_close(got, wanted.reshape(got.shape), rtol=1e-10, atol=1e-10)
    terms.loss.backward()
    assert f.grad is not None
    torch.testing.assert_close(f.grad, golden(f"{problem}/{variant}/grad_f"), rtol=1e-10, atol=1e-10)
    assert method.classifier.weight.grad is None and method.classifier.bias.grad is None


@pytest.mark.parametrize("problem", PROBLEMS)
def test_golden_weighted_cross_entropy(problem: str) -> None:
    logits = golden(f"{problem}/caffe_logits/logits").clone().requires_grad_()
    loss = weighted_cross_entropy(logits, golden(f"{problem}/y"), 0.5, 0.18)
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden(f"{problem}/wce/loss").reshape(()), rtol=1e-10, atol=1e-10)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, golden(f"{problem}/wce/grad_logits"), rtol=1e-10, atol=1e-10)


def loops(z: Tensor, labels: Tensor, attention: Tensor | None, c: OsmCaaConfig) -> float:
    """The docstring's formulas, one pair at a time."""
    sums = dict.fromkeys(("wp", "wn", "p", "n"), 0.0)
    for i in range(len(z)):
        for j in range(i):
            d = math.dist(z[i].tolist(), z[j].tolist())
            a = 1.0 if attention is None else min(float(attention[i]), float(attention[j]))
            if labels[i] == labels[j]:
                s = math.exp(-(d**2) / (c.sigma**2 * (2 if c.mode == "caffe" else 1))) if c.osm else 1.0
                sums["wp"], sums["p"] = sums["wp"] + s * a, sums["p"] + s * a * d**2
            else:
                gap = max(0.0, c.alpha - d)
                s = gap if c.osm else float(gap > 0)
                sums["wn"], sums["n"] = sums["wn"] + s * a, sums["n"] + s * a * gap**2
    positive = 0.5 * sums["p"] / sums["wp"] if sums["wp"] else 0.0
    negative = 0.5 * sums["n"] / sums["wn"] if sums["wn"] else 0.0
    return (1 - c.lam) * positive + c.lam * negative


@pytest.mark.parametrize("mode", ["paper", "caffe"])
@pytest.mark.parametrize("osm", [True, False])
@pytest.mark.parametrize("caa", [True, False])
def test_loss_against_loops(mode: str, osm: bool, caa: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(14, 5, generator=generator, dtype=torch.float64))
    labels = torch.randint(4, (14,), generator=generator)
    attention = torch.rand(14, generator=generator, dtype=torch.float64) if caa else None
    config = OsmCaaConfig(mode=mode, osm=osm, lam=0.3, sigma=0.7, alpha=1.3)  # type: ignore[arg-type]
    got = soft_mining_loss(z, labels, attention, config).loss
    assert float(got) == pytest.approx(loops(z, labels, attention, config), rel=1e-10)


def test_gradient_is_that_of_the_loss() -> None:
    """With `detach_weights: false` of the whole loss; by default of the loss with the weights as they are, held fixed."""
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    method = make(4, 3, 4, detach_weights=False, w_metric=1.0)
    assert torch.autograd.gradcheck(lambda x: method.terms(x, labels)["loss"], f)

    config, same = OsmCaaConfig(), labels[:, None] == labels[None]
    terms = soft_mining_loss(F.normalize(f), labels, None, config)

    def with_fixed_weights(x: Tensor) -> Tensor:
        z = F.normalize(x)
        squared = (z[:, None] - z[None]).square().sum(-1)
        gap = torch.relu(config.alpha - squared.clamp(min=1e-12).sqrt())
        positive, negative = terms.weights * same, terms.weights * ~same
        return 0.25 * ((positive * squared).sum() / positive.sum() + (negative * gap**2).sum() / negative.sum())

    assert torch.autograd.gradcheck(with_fixed_weights, f)
    (expected,) = torch.autograd.grad(with_fixed_weights(f), f)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, f)[0], expected)


def test_metric_loss_sends_nothing_to_the_classifier() -> None:
    method = make(6, 3, 4, w_metric=3.0)
    f = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    terms = method.terms(f, torch.tensor([0, 0, 1, 1, 2, 2]))
    found = torch.autograd.grad(terms["metric"], [*method.classifier.parameters()], allow_unused=True)
    assert all(g is None for g in found)


def test_invariances() -> None:
    generator = torch.Generator().manual_seed(3)
    z = F.normalize(torch.randn(12, 6, generator=generator, dtype=torch.float64))
    labels = torch.arange(12) // 4
    attention = torch.rand(12, generator=generator, dtype=torch.float64)
    config = OsmCaaConfig()
    loss = soft_mining_loss(z, labels, attention, config).loss
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(soft_mining_loss(z[order], labels[order], attention[order], config).loss, loss)
    torch.testing.assert_close(soft_mining_loss(z, labels, 0.01 * attention, config).loss, loss, rtol=1e-9, atol=0)
    wide = soft_mining_loss(z, labels, None, OsmCaaConfig(sigma=1e6, lam=0.0)).loss
    pairs = [(i, j) for i in range(12) for j in range(i) if labels[i] == labels[j]]
    torch.testing.assert_close(wide, torch.stack([0.5 * (z[i] - z[j]).square().sum() for i, j in pairs]).mean())


@pytest.mark.parametrize("logits", ["fnorm", "cosine"])
def test_scale_of_the_embedding_does_not_matter_where_it_is_normalised(logits: str) -> None:
    method, labels = make(4, 3, 4, caa_logits=logits), torch.tensor([0, 0, 1, 1, 2, 2])
    f = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(method.terms(3 * f, labels)["loss"], method.terms(f, labels)["loss"])


def test_caffe_mode_divides_by_the_number_of_pairs() -> None:
    f, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) // 2
    found = {}
    for weight in (None, 1.0):
        torch.manual_seed(0)
        found[weight] = make(4, 4, 4, mode="caffe", w_metric=weight).terms(f, labels)
    torch.testing.assert_close(found[None]["metric"], found[1.0]["metric"] / 28)
    plain = F.cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    assert found[None]["cross_entropy"].item() != pytest.approx(float(plain))


DEGENERATE = {
    "no positive": (torch.randn(4, 3, dtype=torch.float64), [0, 1, 2, 3]),
    "one class": (torch.randn(4, 3, dtype=torch.float64), [1, 1, 1, 1]),
    "no close negative": (torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [-1.0, 0, 0], [-0.9, 0, 0.1]]).double(), [0, 0, 1, 1]),
    "the same image twice": (torch.tensor([[1.0, 2, 3], [1.0, 2, 3], [3, 2, 1], [3, 2, 1]]).double(), [0, 0, 1, 1]),
    "the same image in two classes": (torch.tensor([[1.0, 2, 3]] * 4).double(), [0, 0, 1, 1]),
    "a class with one image": (torch.randn(3, 3, dtype=torch.float64), [0, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["paper", "caffe"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite(case: str, mode: str, dtype: torch.dtype) -> None:
    z, labels = DEGENERATE[case]
    method = make(3, 4, 3, mode=mode).to(dtype)
    f = z.detach().clone().to(dtype).requires_grad_()
    method.terms(f, torch.tensor(labels))["loss"].backward()
    assert f.grad is not None and torch.isfinite(f.grad).all()


def test_a_nan_image_is_not_hidden() -> None:
    f = torch.randn(4, 3, dtype=torch.float64)
    f[2, 1] = torch.nan
    assert torch.isnan(make(3, 2, 3).terms(f, torch.tensor([0, 0, 1, 1]))["loss"])


def test_local_pairs() -> None:
    """The mean of the losses within the shares; an empty share and one of a single image have none."""
    f, labels = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 0, 0, 2, 2, 2])
    method = make(4, 3, 4)
    shards = (slice(0, 4), slice(4, 4), slice(4, 8), slice(8, 9))
    parts = [method.terms(f[s], labels[s])["metric"] for s in (shards[0], shards[2])]
    torch.testing.assert_close(method.terms(f, labels, shards)["metric"], sum(parts) / 2)


def test_video() -> None:
    """Tracklets of 3 frames: pooled by attention, classified and compared beside their frames."""
    torch.manual_seed(0)
    method = make(4, 3, 4, frames=3, samples_per_class=6)
    f, labels = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) // 6
    got = method.terms(f, labels)
    own = method.logits(method.classifier, f).softmax(1)[torch.arange(12), labels].detach()
    tracks = torch.stack(
        [sum(own[3 * t + i] * f[3 * t + i] for i in range(3)) / own[3 * t : 3 * t + 3].sum() for t in range(4)]
    )
    assert method.tracklet_classifier is not None
    logits = method.tracklet_classifier(tracks)
    attention = logits.softmax(1)[torch.arange(4), labels[::3]].detach()
    z = F.normalize(tracks)
    expected = F.cross_entropy(logits, labels[::3]) + loops(z, labels[::3], attention, method.config)
    frames = F.cross_entropy(method.classifier(f), labels) + loops(F.normalize(f), labels, own, method.config)
    torch.testing.assert_close(got["loss"], expected + frames)
    torch.testing.assert_close(attention_pool(f.unflatten(0, (4, 3)), own.unflatten(0, (4, 3))), tracks)


def test_a_step_trains_head_and_classifier() -> None:
    method = make(5, 3, 4)
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    context = FakeContext(method, features=torch.randn(6, 5, dtype=torch.float64))
    logs = method.training_step(make_batch([0, 0, 1, 1, 2, 2]), context)
    assert logs["loss"] == pytest.approx(logs["cross_entropy"] + logs["metric"])
    assert all(not torch.equal(before[n], p) for n, p in method.named_parameters())
    embedded = method.embed(torch.randn(2, 5, dtype=torch.float64))
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_config() -> None:
    with pytest.raises(ValueError, match="expected a multiple of frames"):
        OsmCaaConfig(frames=4)
    with pytest.raises(ValueError, match="global_pairs: false is for images"):
        OsmCaaConfig(frames=7, global_pairs=False)
