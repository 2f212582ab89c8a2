"""Smart Mining: golden losses, the controller, plans from real servers, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods import Batch
from methods.config import Clock
from methods.smart_mining import Controller, SmartMining, SmartMiningConfig, global_loss, triplet_loss
from methods.smart_mining_rule import HALF_MINED, MINED, RANDOM
from pipeline.distributed.collectives import Ranks
from pipeline.errors import UserError
from pipeline.mining.messages import ServerSpec
from pipeline.mining.method_view import MethodMining
from pipeline.mining.server import MiningServer
from pipeline.mining.transport import LocalTransport
from pipeline.storage import Folder
from tests.methods.context import FakeContext
from tests.methods.test_smart_mining_rule import algorithm
from tests.pipeline.mining.test_client import Mortal

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("tight_k1", "sop_like_k2")


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_golden_losses(case: str) -> None:
    """Of the fully mined triplets: every one of them has a loss."""
    g = np.load(GOLDEN / f"smart_mining_{case}.npz")
    x = torch.from_numpy(g["X"]).double()
    a, p, n = torch.from_numpy(g["triplets"][g["kind"] == MINED]).T
    loss, near, far = triplet_loss(x[a], x[p], x[n], 0.2)
    np.testing.assert_allclose(loss, g["triplet_loss"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(near / 4, g["d_pos"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(far / 4, g["d_neg"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(global_loss(near, far, 0.01, 0.8), g["global_loss"], rtol=1e-6, atol=1e-9)
    assert bool((loss > 0).all()) and float(g["train_error"]) == pytest.approx(float((loss > 0).double().mean()))


def test_gradients_of_the_losses() -> None:
    """Those of the paper's formulas; finite for the same image twice."""
    torch.manual_seed(0)
    rows = [torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64)).requires_grad_() for _ in range(3)]
    a, p, n = rows
    loss, near, far = triplet_loss(a, p, n, 0.2)
    loss.sum().backward()
    u, v = far.sqrt()[:, None], near.sqrt()[:, None]
    active = (loss > 0).double()[:, None]
    assert bool(active.any())
    dn, dp = active * (a - n) / (u * (v + 0.2)), -active * u / (v + 0.2) ** 2 * (a - p) / v
    for row, wanted in ((n, dn), (p, dp), (a, -dn - dp)):
        assert row.grad is not None
        torch.testing.assert_close(row.grad, wanted.detach(), rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(lambda near, far: global_loss(near, far, 0.5, 0.8), (near.detach().requires_grad_(), far.detach().requires_grad_()))  # fmt: skip
    twice = torch.ones(2, 3, requires_grad=True)
    triplet_loss(twice, twice, twice, 0.2)[0].sum().backward()
    assert twice.grad is not None and bool(torch.isfinite(twice.grad).all())


def test_global_loss_is_that_of_the_whole_batch() -> None:
    near, far = torch.rand(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)
    p, n = near.numpy() / 4, far.numpy() / 4
    wanted = p.var() + n.var() + 0.7 * max(0.0, p.mean() - n.mean() + 0.3)
    assert float(global_loss(near, far, 0.3, 0.7)) == pytest.approx(wanted, rel=1e-12)
    assert float(global_loss(near[:1], far[:1], 0.3, 0.7)) >= 0  # one triplet has no variance


# ---- controller ------------------------------------------------------------------------------------------------------


def test_controller_fits_a_line() -> None:
    c = Controller(SmartMiningConfig(prior_weight=0, target_error=0.6))
    c.history = [(0.31, 16.0), (0.42, 8.0), (0.55, 4.0)]
    c.fit()
    assert (c.alpha, c.beta) == (pytest.approx(-49.422633), pytest.approx(30.420323))
    assert c.alpha * 0.6 + c.beta == pytest.approx(0.766744, abs=1e-6)
    c.history, c.kappa = c.history[:2], 4.0
    c.update(0.55)
    assert c.kappa == 1.0 and c.pinned == 1


def test_controller_starts_on_the_prior_line_and_keeps_its_slope() -> None:
    c = Controller(SmartMiningConfig(target_error=0.6))
    assert c.kappa == pytest.approx(64 - 63 * 0.6)
    c.update(0.3)  # too easy: harder
    first = c.kappa
    assert first < 26 and c.alpha < 0
    slope = c.alpha
    c.history = [(0.3, 20.0), (0.6, 30.0), (0.9, 60.0)]
    c.fit()
    assert c.alpha == slope  # more errors at larger κ: not believed
    assert c.beta == pytest.approx(np.average([64, 1, 20, 30, 60], weights=[0.1, 0.1, 1, 1, 1]) - slope * np.average([0, 1, 0.3, 0.6, 0.9], weights=[0.1, 0.1, 1, 1, 1]))  # fmt: skip
    for _ in range(9):
        c.update(0.5)
    assert len(c.history) == 5
    other = Controller(c.config)
    other.load(c.state())
    assert vars(other) == vars(c)


@pytest.mark.filterwarnings("error")
def test_controller_says_when_the_target_is_out_of_reach() -> None:
    c = Controller(SmartMiningConfig(target_error=0.9))
    c.update(0.1), c.update(0.1)
    with pytest.warns(
        UserWarning, match=r"kappa has been at the end of its range, 1, for 3 epochs \(error of the last: 0.10"
    ):
        c.update(0.1)


def test_controller_that_is_switched_off() -> None:
    c = Controller(SmartMiningConfig(adaptive=False, kappa=7))
    c.update(0.1)
    assert c.kappa == 7
    with pytest.raises(ValueError, match="adaptive is off: set kappa"):
        SmartMiningConfig(adaptive=False)
    with pytest.raises(ValueError, match="set triplets_per_batch, leave out samples_per_class"):
        SmartMiningConfig(samples_per_class=5)
    with pytest.raises(ValueError, match="kappa_min 9 is above kappa_max 8"):
        SmartMiningConfig(kappa_min=9, kappa_max=8)


# ---- the method ------------------------------------------------------------------------------------------------------

LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(14), [1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 9, 1, 4, 6]))
EMBEDDINGS = torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(4)) + 0.8 * torch.eye(14, 5)[LABELS]


class Swept(FakeContext):
    """Embeddings that are given, and real servers in this process."""

    def __init__(self, method: SmartMining, folder: Path, servers: list[Any]) -> None:
        super().__init__(method)
        self.labels, self.sweeps = LABELS, 0
        needs = method.config.mining
        assert needs is not None and needs.table
        spec = ServerSpec("run", 5, engine="exact", k=needs.neighbours)
        self.mining = MethodMining(needs, spec, servers, Ranks(), self.device, Folder(folder))
        self.mining.begin(1, None)

    def embed_samples(self, ids: Any, embed: bool = True) -> Tensor:
        self.sweeps += 1
        return EMBEDDINGS[torch.from_numpy(ids)]


def make(folder: Path, shards: int | list[Any] = 1, **config: Any) -> tuple[SmartMining, Swept]:
    servers = [LocalTransport(MiningServer()) for _ in range(shards)] if isinstance(shards, int) else shards
    values = {"embedding_dim": 5, "triplets_per_batch": 8, "random_epochs": 1, "kappa": 1.1} | config
    method = SmartMining(SmartMiningConfig(**values), 5, 14)
    return method, Swept(method, folder, servers)


@pytest.mark.parametrize("positives", ["list", "class"])
@pytest.mark.parametrize("k", [4, 1000])
def test_plans_do_not_depend_on_the_number_of_shards(tmp_path: Path, k: int, positives: str) -> None:
    found = []
    for shards in (1, 2, 4):
        method, context = make(
            tmp_path / str(shards), shards, list_length=k, positives=positives, triplets_per_anchor=2
        )
        found.append(method.plan(3, context))
        assert context.sweeps == 1 and set(method.seconds) == {"sweep", "lists", "rule"}
        context.mining.close()
    assert all(np.array_equal(p.ids, found[0].ids) and np.array_equal(p.columns["kind"], found[0].columns["kind"]) for p in found)  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"anchors": 20}, {"triplets_per_anchor": 3}, {"triplets_per_batch": 50}])
def test_the_shape_of_an_epoch_is_known_before_training(tmp_path: Path, config: dict[str, Any]) -> None:
    method, context = make(tmp_path, **config)
    assert method.epoch_shape(context) == method.plan(0, context).ids.shape == method.plan(3, context).ids.shape
    context.mining.close()


@pytest.mark.parametrize("after", [False, True])
def test_a_server_may_die_while_triplets_are_mined(
    tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any call: while rows are put, while lists are made; what is sent again has the same tag."""
    monkeypatch.setattr("pipeline.mining.request_log._POLL_S", 0.01)
    method, context = make(tmp_path / "whole", 2)
    wanted = method.plan(3, context)
    context.mining.close()
    deaths = 0
    for death in range(2, 20):
        servers = [Mortal({death}, after), LocalTransport(MiningServer())]
        method, context = make(tmp_path / f"{death}", servers)
        found = method.plan(3, context)
        assert np.array_equal(found.ids, wanted.ids), death
        assert (servers[0].calls > death) == (servers[0].begun > 1), "each death was noticed"
        deaths += servers[0].begun > 1
        context.mining.close()
    assert deaths >= 4  # put, and the calls that make lists


def test_all_of_the_class_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    """In short lists most positives are missing."""
    shares = []
    for length, positives in ((8, "list"), (8, "class"), (1000, "list"), (1000, "class")):
        method, context = make(tmp_path / f"{length}{positives}", list_length=length, positives=positives)
        shares.append(float((method.plan(1, context).columns["kind"] == MINED).mean()))
    assert shares[0] < shares[1] < shares[2] == shares[3]


def test_plan(tmp_path: Path) -> None:
    """Random at first; then every image that is not alone is an anchor once, and equals the rule on its exact list."""
    method, context = make(tmp_path)
    first = method.plan(0, context)
    assert context.sweeps == 0 and (first.columns["kind"] == RANDOM).all()
    plan = method.plan(1, context)
    anchors, positives, negatives = np.split(plan.ids, 3, axis=1)
    assert (
        plan.ids.shape[1] == 24 and (plan.columns["role"][0] == np.repeat(["anchor", "positive", "negative"], 8)).all()
    )
    assert set(anchors.ravel()) == set(np.flatnonzero(np.bincount(LABELS)[LABELS] > 1))
    assert anchors.size - len(set(anchors.ravel())) < 8  # the last batch is filled up
    kind = plan.columns["kind"][:, :8]
    assert {MINED, HALF_MINED} <= set(kind.ravel())
    x = EMBEDDINGS.numpy().astype(np.float64)
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(d, np.inf)
    order = np.argsort(d, axis=1)[:, :-1]
    for a, p, n, k in zip(anchors.ravel(), positives.ravel(), negatives.ravel(), kind.ravel(), strict=True):
        ((wanted_p, wanted_n, wanted_kind),), _ = algorithm(
            a, order[a].tolist(), d[a][order[a]].tolist(), LABELS, 1.1, 1
        )
        assert k == wanted_kind and (k == RANDOM or n == wanted_n) and (k != MINED or p == wanted_p)
    again, context = make(tmp_path / "again")
    assert np.array_equal(again.plan(1, context).ids, plan.ids)
    assert not np.array_equal(first.ids, method.plan(2, context).ids)


def test_share_and_anchors(tmp_path: Path) -> None:
    method, context = make(tmp_path / "share", mined_share=0.25)
    kind = method.plan(1, context).columns["kind"][:, :8]
    assert (kind[:, 2:] == RANDOM).all() and (kind[:, :2] != RANDOM).mean() > 0.5
    method, context = make(tmp_path / "anchors", anchors=20)
    anchors = method.plan(1, context).ids[:, :8]
    assert len(set(anchors.ravel())) == 20 and anchors.shape == (3, 8)
    assert set(anchors.ravel()) != set(method.plan(2, context).ids[:, :8].ravel())
    assert SmartMiningConfig(mined_share=0).mining is None


def test_approximate_lists_of_full_recall_give_the_same_triplets(tmp_path: Path) -> None:
    exact, context = make(tmp_path / "exact")
    wanted = exact.plan(1, context)
    method, context = make(tmp_path / "approximate", lists="approximate")
    assert np.array_equal(method.plan(1, context).ids, wanted.ids) and method.list_statistics[0] == 1.0


def test_lists_of_other_weights_are_refused(tmp_path: Path) -> None:
    method, context = make(tmp_path)
    method.plan(1, context)
    mining = context.mining
    ids = torch.arange(len(LABELS))
    assert len(mining.all_neighbours(3, tag="epoch 1, weights weights").ids) == len(LABELS)
    with pytest.raises(UserError, match="neighbours of 'epoch 2, weights weights' were requested, but the table holds embeddings of 'epoch 1, weights weights'"):  # fmt: skip
        mining.all_neighbours(3, tag="epoch 2, weights weights")
    mining.step = 5
    mining.put(ids[:10], EMBEDDINGS[:10], torch.from_numpy(LABELS[:10]), "epoch 2, weights weights")
    with pytest.raises(UserError, match=f"but {len(LABELS) - 10} of {len(LABELS)} rows are older"):
        mining.all_neighbours(3, tag="epoch 2, weights weights")
    mining.put(ids, EMBEDDINGS, torch.from_numpy(LABELS))  # of a training step
    with pytest.raises(UserError, match="but the table holds embeddings of 'training steps'"):
        mining.all_neighbours(3, tag="epoch 2, weights weights")
    assert len(mining.all_neighbours(3).ids) == len(LABELS)


def test_a_tag_survives_a_snapshot(tmp_path: Path) -> None:
    method, context = make(tmp_path, shards=2)
    method.plan(1, context)
    context.mining.save(Folder(tmp_path / "snapshot"))
    second = make(tmp_path / "other", shards=3)[1]
    second.mining.begin(2, Folder(tmp_path / "snapshot"))
    assert len(second.mining.all_neighbours(3, tag="epoch 1, weights weights").ids) == len(LABELS)


def test_steps_and_epochs(tmp_path: Path) -> None:
    """The error of an epoch is that of its triplets; it moves κ; both survive in the state."""
    method, context = make(tmp_path, kappa=None, random_epochs=0, target_error=0.5)
    method.double()
    plan, active, total = method.plan(0, context), 0, 0
    for row in range(len(plan)):
        context.clock = Clock(row, 0.1 * row)
        context.features = EMBEDDINGS[torch.from_numpy(plan.ids[row])].double()
        a, p, n = method.embed(context.features).chunk(3)
        loss, near, far = triplet_loss(a, p, n, 0.2)
        wanted = loss.mean() + global_loss(near, far, 0.01, 0.8)
        columns = {name: column[row] for name, column in plan.columns.items()}
        logs = method.training_step(Batch(torch.zeros(24, dtype=torch.int64), torch.zeros(24, dtype=torch.int64), columns), context)  # fmt: skip
        active, total = active + int((loss > 0).sum()), total + 8
        assert logs["loss"] == pytest.approx(float(wanted.detach()), rel=1e-9)
        assert logs["error"] == active / total and logs["kappa"] == 32.5
        assert logs["share/mined"] + logs["share/half_mined"] + logs["share/random"] == pytest.approx(1)
    method.on_epoch_end(0, context, None)
    assert method.controller.history == [(active / total, 32.5)] and method.counts.tolist() == [0, 0]
    assert method.controller.kappa != 32.5
    other = SmartMining(method.config, 5, 14).double()
    other.load_state_dict(method.state_dict())
    assert vars(other.controller) == vars(method.controller) and other.list_statistics == method.list_statistics
    assert other.get_extra_state().dtype == torch.float64


def test_too_few_classes(tmp_path: Path) -> None:
    method, context = make(tmp_path)
    for labels in (np.arange(5), np.zeros(5, np.int64)):
        context.labels = labels
        with pytest.raises(ValueError, match="triplets need at least two classes"):
            method.plan(0, context)
