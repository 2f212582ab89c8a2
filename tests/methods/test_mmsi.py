"""MMSI against the authors' numbers, against double backward, and at the edges of what a batch can be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods import Batch
from methods.config import Clock, Length
from methods.mmsi import Mmsi, MmsiConfig
from methods.mmsi_weights import gradient_of_weights, meta_loss, normalise_weights, select_pairs, weighted_loss
from methods.plans import Plan
from pipeline.distributed.collectives import Ranks
from pipeline.mining.memory import EmbeddingMemory
from pipeline.model.trunk import Trunk
from pipeline.training.context import RunContext

GOLDEN = Path(__file__).parent.parent / "golden"
LOSSES, TRACE = np.load(GOLDEN / "mmsi_losses_f64.npz"), np.load(GOLDEN / "mmsi_trace_Con_f64.npz")
NAMES = {"Con_a": "contrastive", "MS_a": "multi_similarity"}
ALL = ("contrastive", "multi_similarity", "binomial", "lifted", "triplet")


def golden(file: Any, key: str) -> Tensor:
    return torch.from_numpy(file[key])


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted.reshape(got.shape), rtol=tolerance, atol=tolerance)


def entries(features: Tensor, labels: Tensor) -> EmbeddingMemory:
    memory = EmbeddingMemory(features.shape[1], total=10**6, dtype=torch.float64)
    memory.append(features, labels, torch.arange(len(labels)))
    return memory


# ---- the authors' numbers -------------------------------------------------------------------------------------------


def golden_config(case: str) -> MmsiConfig:
    margin, alpha, beta, base = (float(LOSSES[f"{case}/{k}"]) for k in ("margin", "alpha", "beta", "base"))
    return MmsiConfig(loss=cast(Any, NAMES[case]), margin=margin, alpha=alpha, beta=beta, base=base)


@pytest.mark.parametrize("case", NAMES)
def test_golden_plain_loss_and_selection(case: str) -> None:
    c, x, y = golden_config(case), golden(LOSSES, f"{case}/x").requires_grad_(), golden(LOSSES, f"{case}/y")
    chosen = select_pairs(x @ x.T, y, c)
    assert chosen.positives.sum(1).tolist() == LOSSES[f"{case}/ap_list"].tolist()
    assert chosen.negatives.sum(1).tolist() == LOSSES[f"{case}/an_list"].tolist()
    value = weighted_loss(x @ x.T, 1.0, chosen, c)
    close(value, golden(LOSSES, f"{case}/plain_loss"))
    value.backward()
    assert x.grad is not None
    close(x.grad, golden(LOSSES, f"{case}/plain_grad"))


@pytest.mark.parametrize("weights", ["rand", "zero", "one"])
@pytest.mark.parametrize("case", NAMES)
def test_golden_weighted_loss(case: str, weights: str) -> None:
    c, x, y = golden_config(case), golden(LOSSES, f"{case}/x").requires_grad_(), golden(LOSSES, f"{case}/y")
    anchor, other, positive = golden(LOSSES, f"{case}/slots").long().T
    chosen = select_pairs(x @ x.T, y, c)
    slots = torch.zeros_like(chosen.slots)
    slots[anchor, other] = True
    assert torch.equal(slots, chosen.slots)
    w = torch.zeros(slots.shape, dtype=torch.float64)
    w[anchor, other] = golden(LOSSES, f"{case}/w_{weights}")
    w.requires_grad_()
    value = weighted_loss(x @ x.T, w, chosen, c)
    wanted = golden(LOSSES, f"{case}/wloss_{weights}").clone()
    slip = torch.zeros(len(anchor), dtype=torch.float64)
    if case == "Con_a":  # they write -(1 + s) where 1 - s is meant
        slip = 2 * positive.double() / len(x)
        wanted += (slip * golden(LOSSES, f"{case}/w_{weights}")).sum()
    close(value, wanted)
    value.backward()
    assert x.grad is not None and w.grad is not None
    close(x.grad, golden(LOSSES, f"{case}/wgrad_x_{weights}"))
    close(w.grad[anchor, other], golden(LOSSES, f"{case}/wgrad_w_{weights}") + slip)


@pytest.mark.parametrize("case", NAMES)
def test_golden_meta_loss(case: str) -> None:
    v = golden(LOSSES, f"{case}/val_x").requires_grad_()
    memory = entries(golden(LOSSES, f"{case}/dict_x"), golden(LOSSES, f"{case}/dict_y"))
    ids = torch.full((len(v),), -1)
    value = meta_loss(v, golden(LOSSES, f"{case}/val_y"), ids, memory, golden_config(case))
    close(value, golden(LOSSES, f"{case}/meta_loss"))
    value.backward()
    assert v.grad is not None
    close(v.grad, golden(LOSSES, f"{case}/meta_grad_val"))


# ---- small networks, with the run's own context ---------------------------------------------------------------------


class Net(Trunk):
    """tanh(x W1ᵀ + b1) W2ᵀ + b2."""

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        self.fc1, self.fc2 = nn.Linear(*sizes[:2]), nn.Linear(*sizes[1:])

    def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc2(torch.tanh(self.fc1(pixels)))

    def set_mode(self, training: bool, ranks: Ranks) -> None:
        pass


class Unit(nn.Module):
    """A head without parameters."""

    def __init__(self, length: float = 1.0) -> None:
        super().__init__()
        self.length = length

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.normalize(features) * self.length


class Memorised:
    """A memory in float64, without a server."""

    def __init__(self, dim: int, per_class: int) -> None:
        self.memory, self.step = EmbeddingMemory(dim, per_class, dtype=torch.float64), 0

    def put(self, ids: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        self.memory.append(embeddings, labels, ids)


class Setting:
    """A method over a small network, and its steps on given inputs."""

    def __init__(self, config: MmsiConfig, sizes: tuple[int, int, int], classes: int, head: nn.Module | None = None):
        torch.manual_seed(0)
        self.net = Net(sizes).double()
        self.method = Mmsi(config, sizes[2], classes).double()
        if head is not None:
            self.method.head = cast(Any, head)
        self.mining = Memorised(config.embedding_dim, config.memory_per_class)
        # 10,000 samples are enough for the slots of all steps
        samples = cast(Any, SimpleNamespace(labels=np.zeros(10**4, np.int64), ids=np.arange(10**4), tracks=None))
        # stand-ins for the dataset and the server: past the check of types at run time
        self.context = RunContext.__new__(RunContext)
        init: Callable[..., None] = RunContext.__init__.__wrapped__ if hasattr(RunContext.__init__, "__wrapped__") else RunContext.__init__  # type: ignore[attr-defined]  # fmt: skip
        init(
            self.context, samples, 0, Length(value=100, unit="steps"), "float64", torch.device("cpu"), Ranks(), self.net,
            self.method, cast(Any, None), lambda: None, cast(Any, self.mining),
        )  # fmt: skip

    def step(
        self, train_x: Tensor, train_y: Tensor, meta_x: Tensor, meta_y: Tensor, clock: Clock | None = None
    ) -> dict[str, float]:
        labels = torch.cat([train_y, meta_y])
        role = np.repeat(np.array(["train", "meta"]), [len(train_y), len(meta_y)])
        ids = np.arange(len(labels))
        plan = Plan(ids[None], {"role": role[None]})
        self.context.labels = labels.numpy()
        batch = self.context.begin_step(clock or Clock(), plan, 0, torch.cat([train_x, meta_x]))
        return self.method.training_step(Batch(batch.ids, labels, batch.columns), self.context)

    def parameters(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for m in (self.net, self.method) for n, p in m.named_parameters()}


def test_golden_trace_of_the_official_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 iterations: memory, updates, weights and parameters."""
    values = {k: float(TRACE[k]) for k in ("margin", "alpha", "beta", "base")}
    config = MmsiConfig(
        loss="contrastive", embedding_dim=8, memory_per_class=int(TRACE["d_size"]), warmup_classes=98, **values,
        optimizer={"name": "adam", "lr": float(TRACE["lr"]), "weight_decay": float(TRACE["wd"])},
    )  # fmt: skip
    setting = Setting(config, (12, 16, 8), 200, Unit(1 + 1e-9))
    setting.net.load_state_dict({n: golden(TRACE, f"init/{n}") for n in setting.net.state_dict()})
    seen: list[Tensor] = []
    monkeypatch.setattr("methods.mmsi.normalise_weights", lambda *a: seen.append(normalise_weights(*a)) or seen[-1])  # type: ignore[func-returns-value]
    for t in range(int(TRACE["n_steps"])):
        x, y = golden(TRACE, f"s{t}/train_x"), golden(TRACE, f"s{t}/train_y")
        updated = bool(TRACE[f"s{t}/updated"])
        meta = (golden(TRACE, f"s{t}/val_x"), golden(TRACE, f"s{t}/val_y")) if updated else (x[:10], y[:10])
        before = len(seen)
        setting.step(x, y, *meta)
        memory = setting.mining.memory
        order = torch.argsort(memory.labels, stable=True)
        wanted = torch.argsort(golden(TRACE, f"s{t}/dict_y"), stable=True)
        assert torch.equal(memory.labels[order], golden(TRACE, f"s{t}/dict_y")[wanted])
        if config.memory_per_class == 1:
            close(memory.features[order], golden(TRACE, f"s{t}/dict_x")[wanted])
        assert len(seen) - before == updated
        if updated:
            close(seen[-1], golden(TRACE, f"s{t}/W"))
        for name, value in setting.net.state_dict().items():
            close(value, golden(TRACE, f"s{t}/param/{name}"))
    assert len(seen) >= 10


def make_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 12, generator=random, dtype=torch.float64)
    labels, meta = torch.arange(20) // 4, torch.arange(5)
    x = centres[labels] + 0.7 * torch.randn(20, 12, generator=random, dtype=torch.float64)
    v = centres[meta] + 0.7 * torch.randn(5, 12, generator=random, dtype=torch.float64)
    return x, labels, v, meta


def by_double_backward(setting: Setting, problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """-∂L_meta/∂w through the virtual step, as the authors' program takes it; the memory holds the batch already."""
    x, y, v, vy = problem
    config, lr = setting.method.config, setting.method.config.optimizer.lr
    parameters = dict(setting.net.named_parameters()) | {
        f"head.{n}": p for n, p in setting.method.head.named_parameters()
    }

    def embed(p: dict[str, Tensor], inputs: Tensor) -> Tensor:
        features = torch.func.functional_call(
            setting.net, {n: t for n, t in p.items() if not n.startswith("head.")}, (inputs,)
        )
        head = {n.removeprefix("head."): t for n, t in p.items() if n.startswith("head.")}
        return torch.func.functional_call(setting.method.head, head, (features,))

    e = embed(parameters, x)
    chosen = select_pairs(e @ e.T, y, config)
    w = torch.full(chosen.slots.shape, config.w_init, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(weighted_loss(e @ e.T, w, chosen, config), list(parameters.values()), create_graph=True)
    moved = {n: p - lr * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    value = meta_loss(embed(moved, v), vy, torch.full((len(v),), -1), cast(Any, setting.mining.memory), config)
    (u,) = torch.autograd.grad(value, w)
    return torch.where(chosen.slots, -u, 0)


@pytest.mark.parametrize("w_init", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "weighting"),
    [(n, w) for n in ALL for w in ("similarity", "gradient") if (n, w) != ("triplet", "gradient")],
)
def test_weights_are_those_of_double_backward(
    name: str, weighting: str, w_init: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MmsiConfig(
        weighting=cast(Any, weighting),
        loss=cast(Any, name), embedding_dim=6, memory_per_class=50, warmup_classes=5, w_init=w_init, alpha=4.0,
        margin={"contrastive": 0.1, "multi_similarity": 0.3, "lifted": 0.3}.get(name),
        optimizer={"name": "sgd", "lr": 0.05},
    )  # fmt: skip
    setting, problem = Setting(config, (12, 10, 7), 5), make_problem()
    twin = copy.deepcopy(setting)
    seen = []
    monkeypatch.setattr("methods.mmsi.gradient_of_weights", lambda *a: seen.append(gradient_of_weights(*a)) or seen[-1])
    logs = setting.step(*problem)
    twin.mining = setting.mining  # which holds the batch now
    wanted = by_double_backward(twin, problem)
    assert float(wanted.abs().max()) > 1e-8
    torch.testing.assert_close(seen[0], wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    before, after = twin.parameters(), setting.parameters()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert logs["skipped/no_weight"] == 0 and logs["meta_loss"] > 0
    # and the step is one on the loss with these weights
    e = twin.method.embed(twin.net(problem[0]))
    chosen = select_pairs(e @ e.T, problem[1], config)
    value = weighted_loss(e @ e.T, normalise_weights(wanted, chosen), chosen, config)
    assert logs["loss"] == pytest.approx(float(value.detach()), rel=1e-9)
    value.backward()
    for module, other in ((twin.net, setting.net), (twin.method.head, setting.method.head)):
        for (n, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p - 0.05 * p.grad, q, rtol=1e-9, atol=1e-12, msg=n)


# ---- steps that teach nothing ----------------------------------------------------------------------------------------


def test_weights_of_the_gradient_leave_the_value_and_scale_each_pair() -> None:
    config = MmsiConfig(loss="multi_similarity", weighting="gradient", margin=0.3, alpha=4.0)
    e = nn.functional.normalize(
        torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    s = (e @ e.T).requires_grad_()
    chosen = select_pairs(s, torch.arange(12) // 3, config)
    plain = weighted_loss(s, 1.0, chosen, config)
    (g,) = torch.autograd.grad(plain, s)
    weights = torch.rand(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * chosen.slots
    value = weighted_loss(s, weights, chosen, config)
    (weighted,) = torch.autograd.grad(value, s)
    assert value.item() == pytest.approx(plain.item()) and float(g.abs().sum()) > 0
    torch.testing.assert_close(weighted, weights * g)


def test_a_floor_leaves_no_pair_without_a_weight() -> None:
    seen: dict[float, dict[str, Any]] = {}
    for floor in (0.0, 0.5):
        setting, problem = Setting(small(warmup_classes=5, weight_floor=floor), (12, 10, 7), 5), make_problem()
        seen[floor] = dict(setting.step(*problem))
    for sign in ("positive", "negative"):
        plain, raised = (float(seen[floor][f"weight/{sign}_mean"]) for floor in (0.0, 0.5))
        assert raised == pytest.approx(0.5 + 0.5 * plain) and 0 < plain < 0.9
    assert max(float(seen[0.5][f"weight/{sign}_max"]) for sign in ("positive", "negative")) == pytest.approx(1)


def small(**config: Any) -> MmsiConfig:
    values = {"loss": "contrastive", "embedding_dim": 6, "optimizer": {"name": "adam", "lr": 0.01}} | config
    return MmsiConfig(**cast(Any, values))


def test_nothing_is_learnt_until_the_memory_knows_enough_classes() -> None:
    setting = Setting(small(warmup_classes=98), (12, 10, 7), 6)  # of the 6 there are, all
    x, y, v, vy = make_problem()
    before = setting.parameters()
    for i in (1, 2):
        logs = setting.step(x, y, v, vy)
        assert logs["skipped/warm_up"] == i and logs["loss"] > 0 and "meta_loss" not in logs
    assert all(torch.equal(p, before[n]) for n, p in setting.parameters().items())
    assert len(setting.mining.memory) == 40
    assert setting.step(x, y + 1, v, vy)["skipped/warm_up"] == 2
    assert not all(torch.equal(p, before[n]) for n, p in setting.parameters().items())


def test_steps_without_any_weight_are_skipped_and_counted() -> None:
    x, y, v, vy = make_problem()
    setting = Setting(small(warmup_classes=1, margin=2.0), (12, 10, 7), 40)
    before = setting.parameters()
    assert setting.step(x, torch.arange(20), v, vy + 20)["skipped/meta_zero"] == 1  # no pair on either side
    setting = Setting(small(warmup_classes=1, margin=2.0), (12, 10, 7), 40)
    assert setting.step(x, torch.arange(20), v, vy)["skipped/no_weight"] == 1  # meta pairs, none in the batch
    assert all(torch.equal(p, before[n]) for n, p in setting.parameters().items())
    logs = setting.step(x, y, v, vy)
    assert logs["skipped/no_weight"] == 1 and logs["weight/positive_max"] == 1 and logs["weight/negative_max"] == 0
    assert not all(torch.equal(p, before[n]) for n, p in setting.parameters().items())


def test_without_meta_it_is_the_plain_loss() -> None:
    config = small(meta=False, optimizer={"name": "sgd", "lr": 0.1})
    assert config.mining is None and not config.requires_frozen_batch_norm and small().requires_frozen_batch_norm
    setting, (x, y, _, _) = Setting(config, (12, 10, 7), 5), make_problem()
    e = setting.method.embed(setting.net(x))
    logs = setting.step(x, y, x[:0], y[:0])
    assert logs["loss"] == pytest.approx(float(weighted_loss(e @ e.T, 1.0, select_pairs(e @ e.T, y, config), config)))


def test_the_plain_loss_comes_first_where_it_is_asked_for() -> None:
    """Every weight 1, whatever the memory knows; it fills all the same."""
    config = small(meta_start="2 steps", warmup_classes=98, optimizer={"name": "sgd", "lr": 0.1})
    setting, twin = Setting(config, (12, 10, 7), 5), Setting(small(meta=False, optimizer={"name": "sgd", "lr": 0.1}), (12, 10, 7), 5)  # fmt: skip
    x, y, v, vy = make_problem()
    for step in range(2):
        logs, wanted = setting.step(x, y, v, vy, Clock(step)), twin.step(x, y, x[:0], y[:0])
        assert logs["loss"] == pytest.approx(wanted["loss"]) and "meta_loss" not in logs
    before = setting.parameters()
    assert all(torch.equal(p, before[n]) for n, p in twin.parameters().items())
    assert len(setting.mining.memory) == 40 and int(setting.method.skipped.sum()) == 0
    assert "meta_loss" in setting.step(x, y, v, vy, Clock(2))


def test_a_meta_image_can_be_kept_from_its_own_entry() -> None:
    e = nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64))
    memory, ids, labels = entries(e, torch.tensor([0, 0, 1, 2])), torch.tensor([0, 2]), torch.tensor([0, 1])
    with_own = float(meta_loss(e[ids], labels, ids, memory, small(margin=2.0)))
    without = float(meta_loss(e[ids], labels, ids, memory, small(margin=2.0, exclude_same_image=True)))
    assert with_own == pytest.approx(without)  # 1 - s is 0 there
    c = small(loss="multi_similarity", exclude_same_image=True)
    near, far = 2 / 2 * torch.log1p(torch.exp(-2 * (e[0] @ e[1] - 0.5))), torch.exp(40 * (e[0] @ e[2:].T - 0.5)).sum()
    wanted = float(near + 2 / 40 * torch.log1p(far)) / 2  # the second image has no positive left
    assert float(meta_loss(e[ids], labels, ids, memory, c)) == pytest.approx(wanted)
