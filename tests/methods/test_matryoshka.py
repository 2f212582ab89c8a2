"""Nested prefixes of the baseline against calling the library's loss on each prefix by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from pytorch_metric_learning import losses, miners
from torch import Tensor

from methods.baseline import Baseline, BaselineConfig
from methods.functional import global_generators
from methods.metric_learning import References
from tests.methods.test_baseline import CLASSES, DIM, FEATURES, StubContext, batch, build

PREFIXES = [2, 3]


def unit(embeddings: Tensor, dim: int) -> Tensor:
    """The first dimensions of every row, divided by their length, row by row."""
    return torch.stack([row[:dim] / row[:dim].square().sum().sqrt() for row in embeddings])


@pytest.mark.parametrize(
    "name", ["MultiSimilarityLoss", "TripletMarginLoss", "ProxyAnchorLoss", "DynamicSoftMarginLoss"]
)
def test_the_loss_is_the_sum_over_prefixes_by_hand(name: str) -> None:
    """Value and gradient, in float64; proxies and running statistics are each prefix's own."""
    prefixes = (
        [4, 5] if name == "DynamicSoftMarginLoss" else PREFIXES
    )  # whose histogram ends at a distance of random 2-D rows
    method = build(loss=name, matryoshka=prefixes)
    sizes = {"num_classes": CLASSES, "embedding_size": DIM} if name == "ProxyAnchorLoss" else {}
    direct = {}
    for dim, ours in [*((int(d), loss) for d, loss in method.prefix_losses.items()), (DIM, method.loss_function)]:
        direct[dim] = getattr(losses, name)(**(sizes | {"embedding_size": dim} if sizes else {})).double()
        with torch.no_grad():
            for theirs, own in zip(direct[dim].parameters(), ours.parameters(), strict=True):
                assert theirs.shape == own.shape
                theirs.copy_(own)
    assert sorted(direct) == [*prefixes, DIM]
    for step in range(3):  # running statistics go on
        embeddings, labels = batch(step)
        if name == "DynamicSoftMarginLoss":
            for loss in direct.values():
                loss.hist_ = loss.hist_.detach()
        ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
        value = method.loss(ours, labels, StubContext(0, step))
        reference = torch.stack([loss(unit(theirs, dim), labels).reshape(()) for dim, loss in direct.items()]).sum()
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
        value.backward()
        reference.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_the_miner_chooses_for_each_prefix() -> None:
    method = build(loss="TripletMarginLoss", miner="TripletMarginMiner", matryoshka=PREFIXES)
    (embeddings, labels), loss, miner = batch(), losses.TripletMarginLoss(), miners.TripletMarginMiner()
    cuts = [unit(embeddings, dim) for dim in (DIM, *PREFIXES)]
    expected = torch.stack([loss(z, labels, miner(z, labels)) for z in cuts]).sum()
    torch.testing.assert_close(method.loss(embeddings, labels, StubContext()), expected, rtol=1e-12, atol=0)
    assert len({len(miner(z, labels)[0]) for z in cuts}) > 1, "the prefixes choose different triplets"


def test_memory_and_hard_negatives_are_cut_alike() -> None:
    method = build(loss="ContrastiveLoss", matryoshka=PREFIXES, memory=8, hard_negatives=2)
    (embeddings, labels), (past, classes) = batch(), batch(1)
    loss = losses.ContrastiveLoss()
    references = References.of(embeddings, labels, past, classes, negatives_only=False)
    terms = []
    for dim in (DIM, *PREFIXES):
        cut = References.of(unit(embeddings, dim), labels, unit(past, dim), classes, negatives_only=False)
        pairs = cut.tuples(None, embeddings, labels)
        terms.append(loss(unit(embeddings, dim), labels, pairs, ref_emb=cut.embeddings, ref_labels=cut.labels))
    value = method._sum_over_prefixes(embeddings, labels, references)
    torch.testing.assert_close(value, torch.stack(terms).sum(), rtol=1e-12, atol=0)


def test_without_prefixes_nothing_changes() -> None:
    """The whole embedding counts once, also where it is named; state dicts of earlier checkpoints fit."""
    (embeddings, labels), plain = batch(), build()
    for dims in (None, [DIM]):
        same = build(matryoshka=dims)
        assert torch.equal(same.loss(embeddings, labels, StubContext()), plain.loss(embeddings, labels, StubContext()))
        assert same.state_dict().keys() == plain.state_dict().keys()
    assert plain.config.nested_dims == () and build(matryoshka=PREFIXES).config.nested_dims == (*PREFIXES, DIM)


def test_parameters_of_every_prefix_are_trained_and_saved() -> None:
    method = build(loss="ProxyAnchorLoss", matryoshka=PREFIXES)
    shapes = {n: tuple(p.shape) for n, p in method.named_parameters() if not n.startswith("head.")}
    assert shapes == {
        "loss_function.proxies": (CLASSES, DIM), "prefix_losses.2.proxies": (CLASSES, 2), "prefix_losses.3.proxies": (CLASSES, 3)
    }  # fmt: skip
    main = method.optimizers(torch.nn.Linear(1, 1))["main"]
    trained = [p for g in main.inner.param_groups for p in g["params"]]
    assert {id(p) for p in method.parameters()} <= {id(p) for p in trained}


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        ([], "matryoshka is []"),
        ([16, 256], "expected ascending dimensions of at most embedding_dim, 128"),
        ([32, 16], r"matryoshka is \[32, 16\], expected ascending"),
        ([16, 16], "expected ascending"),
        ([0, 16], "greater than or equal to 1"),
        (["x"], "valid integer"),
        ([16.5], "valid integer"),
    ],
)
def test_wrong_dimensions_are_one_line(dims: list[Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says.replace("is []", r"is \[\]")) as caught:
        BaselineConfig(matryoshka=dims)
    assert len(caught.value.errors()) == 1 and "\n" not in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize("text", ["16, 32", [16, 32]])
def test_spellings(text: Any) -> None:
    assert BaselineConfig(matryoshka=text).nested_dims == (16, 32, 128)
    assert BaselineConfig(matryoshka="none").nested_dims == BaselineConfig(matryoshka=None).nested_dims == ()


def test_a_loss_that_fails_on_a_prefix_is_told_at_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "wide_loss.py").write_text(
        "from pytorch_metric_learning.losses import ContrastiveLoss\n"
        "class Wide(ContrastiveLoss):\n"
        "    def compute_loss(self, embeddings, *rest):\n"
        "        if embeddings.shape[1] < 8:\n"
        "            raise ValueError('too few dimensions')\n"
        "        return super().compute_loss(embeddings, *rest)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert BaselineConfig(loss="wide_loss:Wide", matryoshka=[8]).nested_dims == (8, 128)
    with pytest.raises(ValidationError, match="fails on a batch of random embeddings: too few dimensions"):
        BaselineConfig(loss="wide_loss:Wide", matryoshka=[4, 8])


def test_a_saved_loss_goes_on_alike() -> None:
    with global_generators(4):
        method = Baseline(BaselineConfig(embedding_dim=DIM, loss="DynamicSoftMarginLoss", matryoshka=[4]), FEATURES, 5)
    method = method.double()
    for step in range(2):
        method.loss(*batch(step), StubContext(0, step))
    other = Baseline(method.config, FEATURES, CLASSES).double()
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.loss(*batch(2), StubContext(0, 2)), other.loss(*batch(2), StubContext(0, 2)))
