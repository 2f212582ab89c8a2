"""Intra-Batch Connections against the authors' own steps, and the pieces the golden case leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.functional import PlusOneAttention
from methods.intra_batch import IntraBatch, IntraBatchConfig
from methods.intra_batch_reciprocal import reciprocal_neighbours
from methods.optim import OptimizerConfig
from tests.methods.context import FakeContext, make_batch

GOLDEN = Path(__file__).parent.parent / "golden" / "intra_batch_cub_like.pt"


def make(features: int, classes: int, **config: Any) -> IntraBatch:
    torch.manual_seed(0)
    values = {"embedding_dim": 8, "dropout": 0.0, **config}
    return IntraBatch(IntraBatchConfig(**values), features, classes).double()


def renamed(name: str) -> str:
    """A parameter of the authors' program in ours."""
    if name.startswith(("red.", "fc.weight", "fc.bias")):
        return name.replace("red.", "head.linear.").replace("fc.", "classifier.")
    for old, new in (
        ("dim_red", "network.input"), ("gnn_model.node_model.layers", "network.layers"), ("att.q_linear", "attention.query"),
        ("att.k_linear", "attention.key"), ("att.v_linear", "attention.value"), ("att.out", "attention.out"),
        ("bottleneck.0", "network.norm"), ("fc.0", "network.classifier"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


@pytest.fixture
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def method(golden: dict[str, Any]) -> IntraBatch:
    m = golden["meta"]
    config = IntraBatchConfig(
        embedding_dim=m["D"], heads=m["heads"], layers=m["layers"], temperature=m["temperature"],
        label_smoothing=m["label_smoothing"], dropout=m["dropout"],
        optimizer=OptimizerConfig(name="radam", lr=m["lr"], weight_decay=m["wd"], decoupled=True),
    )  # fmt: skip
    made = IntraBatch(config, golden["x"].shape[1], m["n_class"]).double()
    state = {renamed(k): v for part in ("enc_before", "gnn_before") for k, v in golden[part].items()}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"reloads"}
    return made


def test_golden_steps(golden: dict[str, Any], method: IntraBatch) -> None:
    """Losses, gradients, and weights after RAdam's steps, from the un-rectified to the rectified ones."""
    context = FakeContext(method, features=golden["x"])
    close = {"rtol": 1e-6, "atol": 2e-7}
    for step in golden["steps"]:
        f = method.head.linear(golden["x"])
        torch.testing.assert_close(F.normalize(f), step["z"], **close)
        logs = method.training_step(make_batch(golden["y"]), context)
        assert logs["cross_entropy"] == pytest.approx(float(step["ce"]), rel=1e-6)
        assert logs["graph_cross_entropy"] == pytest.approx(float(step["gnn_loss"]), rel=1e-6)
        assert logs["loss"] == pytest.approx(float(step["loss"]), rel=1e-6)
        found = context.seen[-1][1]
        for wanted in (step["enc_grads"], step["gnn_grads"]):
            for name, gradient in wanted.items():
                if gradient is not None:
                    got = found[renamed(name)]
                    assert got is not None
                    torch.testing.assert_close(
                        got, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()) + 1e-12
                    )
        state = method.state_dict()
        for wanted in (step["enc_after"], step["gnn_after"]):
            for name, value in wanted.items():
                torch.testing.assert_close(state[renamed(name)], value, **close)


def test_golden_evaluation(golden: dict[str, Any], method: IntraBatch) -> None:
    assert method.network is not None
    method.eval()
    z = golden["eval"]["z"]
    torch.testing.assert_close(method.network(z), golden["eval"]["pred"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(F.normalize(method.network.nodes(z)), golden["eval"]["feats"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(method.embed(golden["x"]).norm(dim=1), torch.ones(12, dtype=torch.float64))


def test_attention_against_loops() -> None:
    """Every target, head and source by itself; the extra logit of zero; a target without any source."""
    torch.manual_seed(0)
    layer = PlusOneAttention(6, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    allowed = torch.rand(5, 5) < 0.6
    allowed[3] = False
    q, k, v = (part(x) for part in (layer.query, layer.key, layer.value))
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for t in range(5):
        for head in (slice(0, 3), slice(3, 6)):
            e = {s: torch.exp(q[t, head] @ k[s, head] / 3**0.5) for s in range(5) if allowed[t, s]}
            for s, weight in e.items():
                expected[t, head] += weight / (1 + sum(e.values())) * v[s, head]
    torch.testing.assert_close(layer(x, allowed), layer.out(expected))
    torch.testing.assert_close(layer(x, allowed)[3], layer.out.bias)
    assert torch.autograd.gradcheck(lambda y: layer(y, allowed), x.requires_grad_())


def test_attention_dropout_is_on_the_weights_and_in_training_only() -> None:
    torch.manual_seed(0)
    layer, x = PlusOneAttention(4, 1, dropout=0.5), torch.randn(6, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gradient() -> None:
    method = make(4, 3, heads=2, layers=2, concatenate=True)
    f = torch.randn(6, 8, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda x: method.terms(x, labels)["loss"], f)


def test_order_of_the_batch_does_not_matter() -> None:
    method = make(4, 3, layers=2)
    f, labels = torch.randn(9, 8, dtype=torch.float64), torch.arange(9) // 3
    order = torch.randperm(9)
    torch.testing.assert_close(method.terms(f[order], labels[order])["loss"], method.terms(f, labels)["loss"])


def test_shapes_of_the_variants() -> None:
    wide = make(4, 3, layers=3, concatenate=True).network
    assert wide is not None and wide.classifier.weight.shape == (3, 24) and wide.classifier.bias is None
    plain = make(4, 3, graph=False)
    assert plain.network is None
    assert set(plain.terms(torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, 0, 1, 1]))) == {"loss"}


def test_goes_back_to_the_best_once_at_each_epoch() -> None:
    """Also when the run is resumed within that epoch, or starts later than it."""
    method = make(4, 3, reload_best=(3, 5))
    context = FakeContext(method)
    counts = []
    for epoch in (0, 1, 2, 3, 3, 4, 5, 6):  # epoch 3 resumed
        method.on_epoch_start(epoch, context)
        counts.append(context.loaded_best)
    assert counts == [0, 0, 0, 1, 1, 1, 2, 2]
    assert int(method.state_dict()["reloads"]) == 2


DEGENERATE = {"no positive": [0, 1, 2, 3], "one class": [1, 1, 1, 1], "a class with one image": [0, 0, 0, 1]}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite(case: str, same: bool) -> None:
    method = make(4, 4).float()
    f = (torch.ones(4, 8) if same else torch.randn(4, 8)).requires_grad_()
    loss = method.terms(f, torch.tensor(DEGENERATE[case]))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and f.grad is not None and torch.isfinite(f.grad).all()


def test_a_nan_image_is_not_hidden() -> None:
    f = torch.randn(4, 8, dtype=torch.float64)
    f[1, 0] = torch.nan
    assert torch.isnan(make(4, 2).terms(f, torch.tensor([0, 0, 1, 1]))["loss"])


def by_definition(embeddings: Tensor, k: int) -> list[set[int]]:
    """Expanded k-reciprocal sets, straight from their definition."""
    count = len(embeddings)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(9)
    order = similarity.argsort(descending=True).tolist()

    def mutual(i: int, depth: int) -> set[int]:
        return {j for j in order[i][: depth + 1] if i in order[j][: depth + 1]}

    out = []
    for i in range(count):
        base = mutual(i, k)
        grown = set(base)
        for j in base:
            other = mutual(j, max(1, k // 2))
            if len(other & base) >= 2 / 3 * len(other):
                grown |= other
        out.append(grown - {i})
    return out


def test_reciprocal_neighbours() -> None:
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(40, 4, dtype=torch.float64))
    groups = reciprocal_neighbours(embeddings, 6, 5, block=7)
    for i, (row, grown) in enumerate(zip(groups.tolist(), by_definition(embeddings, 6), strict=True)):
        assert row[0] == i and len(set(row)) == 5
        by_similarity = (embeddings @ embeddings[i]).argsort(descending=True).tolist()
        ranked = [j for j in by_similarity if j in grown][:4]
        assert row[1 : 1 + len(ranked)] == ranked
        rest = [j for j in by_similarity if j != i and j not in ranked]
        assert row[1 + len(ranked) :] == rest[: 4 - len(ranked)]
    with pytest.raises(ValueError, match="at least as many images, got 3"):
        reciprocal_neighbours(embeddings[:3], 6, 5)


def test_reciprocal_inference_hears_its_own_group_only() -> None:
    method = make(4, 3, inference="reciprocal", neighbours=3, reciprocal_k=4).eval()
    assert method.network is not None
    embeddings = F.normalize(torch.randn(70, 8, dtype=torch.float64))
    refined = method.refine_embeddings(embeddings)
    for i, ids in enumerate(reciprocal_neighbours(embeddings, 4, 3)):
        expected = F.normalize(method.network.nodes(embeddings[ids]))[0]
        torch.testing.assert_close(refined[i], expected)
    assert make(4, 3).refine_embeddings(embeddings) is embeddings


def test_config() -> None:
    for values, says in (
        ({"heads": 3}, "expected a divisor of embedding_dim"),
        ({"graph": False, "inference": "reciprocal"}, "set graph to true"),
        ({"reload_best": (0,)}, "expected epochs from 1 on"),
    ):
        with pytest.raises(ValueError, match=says):
            IntraBatchConfig(**values)  # type: ignore[arg-type]
