"""The baseline against calling pytorch-metric-learning directly, and the contract's defaults, which it uses unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pytorch_metric_learning import losses, miners

from methods import METHODS, Baseline, Batch, Context, Method, MethodConfig
from methods.baseline import BaselineConfig, loss_classes, miner_classes
from methods.config import Clock
from methods.functional import global_generators
from methods.head import Head
from methods.plans import class_balanced
from pipeline.distributed.collectives import Ranks

DIM, FEATURES, CLASSES = 6, 10, 5
ARGS: dict[str, dict[str, Any]] = {"RankedListLoss": {"margin": 0.4, "Tn": 10}}  # all others have defaults
SIZES = {"num_classes": CLASSES, "embedding_size": DIM}
WITH_PROXIES = (
    "ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss",
    "SoftTripleLoss", "SphereFaceLoss", "SubCenterArcFaceLoss",
)  # fmt: skip
GIVEN = {name: SIZES for name in WITH_PROXIES} | {"P2SGradLoss": {"num_classes": CLASSES, "descriptors_dim": DIM}}
RANDOM = {
    "DistanceWeightedMiner": ("miner", {}),
    "UniformHistogramMiner": ("miner", {}),
    "TripletMarginLoss": ("loss", {"triplets_per_anchor": 2}),
}


class StubContext(Context):
    """One process without a trunk; notes the order of calls."""

    ranks = Ranks()  # read by beartype's check of the protocol, in an order that depends on the hash seed

    def __init__(self, seed: int = 0, step: int = 0, features: torch.Tensor | None = None) -> None:
        self.labels = np.repeat(np.arange(6), 3).astype(np.int64)
        self.seed, self.clock = seed, Clock(step, 0.5)
        self.device, self.dtype, self.generator = torch.device("cpu"), torch.float64, torch.Generator()
        self.features = features
        self.calls: list[str] = []
        self.next_ids = None

    def encode(self, role=None, keep_for_jvp=False):
        self.calls.append("encode")
        return self.features

    def backward(self, loss, retain_graph=False):
        self.calls.append("backward")
        loss.backward()

    def step(self, optimizer):
        self.calls.append(f"step {optimizer}")


def build(**values: Any) -> Baseline:
    torch.manual_seed(0)
    config = BaselineConfig(embedding_dim=DIM, **values)
    return Baseline(config, FEATURES, CLASSES).double()


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings near class centres, 4 of each class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(4)
    centres = torch.randn(CLASSES, DIM, generator=random, dtype=torch.float64)
    x = centres[labels] + 0.8 * torch.randn(len(labels), DIM, generator=random, dtype=torch.float64)
    return torch.nn.functional.normalize(x), labels


def global_state() -> tuple:
    return torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


# ---- any loss, any miner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(loss_classes()))
def test_each_loss_equals_calling_it(name: str) -> None:
    args = ARGS.get(name, {})
    method = build(loss=name, loss_args=args)
    direct = getattr(losses, name)(**args, **GIVEN.get(name, {})).double()
    with torch.no_grad():
        for (n, ours), (m, theirs) in zip(
            method.loss_function.named_parameters(), direct.named_parameters(), strict=True
        ):
            assert n == m
            theirs.copy_(ours)
    for step in range(3):  # some losses keep running statistics
        embeddings, labels = batch(step)
        if name == "DynamicSoftMarginLoss":
            direct.hist_ = direct.hist_.detach()  # as it is, its second step fails: "backward a second time"
        ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
        value, reference = method.loss(ours, labels, StubContext(0, step)), direct(theirs, labels)
        assert value.shape == ()
        torch.testing.assert_close(value, reference.reshape(()), rtol=1e-12, atol=1e-12)
        value.backward()
        reference.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(miner_classes()) - set(RANDOM)))
def test_each_miner_equals_calling_it(name: str) -> None:
    embeddings, labels = batch()
    expected = losses.MultiSimilarityLoss()(embeddings, labels, getattr(miners, name)()(embeddings, labels))
    value = build(miner=name).loss(embeddings, labels, StubContext())
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert float(value) != float(build().loss(embeddings, labels, StubContext())), "the miner takes part"


def test_arguments_reach_loss_and_miner() -> None:
    args = {"alpha": 3, "beta": 20, "base": 0.4}
    method = build(loss_args=args, miner="MultiSimilarityMiner", miner_args={"epsilon": 0.3})
    embeddings, labels = batch()
    expected = losses.MultiSimilarityLoss(**args)(
        embeddings, labels, miners.MultiSimilarityMiner(epsilon=0.3)(embeddings, labels)
    )
    torch.testing.assert_close(method.loss(embeddings, labels, StubContext()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_random_draws_follow_seed_and_step_alone(name: str) -> None:
    kind, args = RANDOM[name]
    values = {"miner": name, "loss": "TripletMarginLoss"} if kind == "miner" else {"loss": name}
    embeddings, labels = batch()

    def value(seed: int, step: int) -> float:
        return float(build(**values, **{f"{kind}_args": args}).loss(embeddings, labels, StubContext(seed, step)))

    torch.manual_seed(1)
    np.random.seed(1)
    first = value(3, 7)
    torch.manual_seed(2)
    np.random.seed(2)
    method = build(**values, **{f"{kind}_args": args})
    state = global_state()
    assert float(method.loss(embeddings, labels, StubContext(3, 7))) == first
    assert global_state() == state, "the global generators stand where they stood"
    assert len({value(3, step) for step in range(6)} | {first}) > 2, "another step draws again"
    assert len({value(seed, 7) for seed in range(6)} | {first}) > 2, "another seed draws again"


def test_global_generators_are_restored_after_an_error() -> None:
    state = global_state()
    with pytest.raises(ZeroDivisionError), global_generators(1, 2):
        torch.rand(3), np.random.rand(3)
        raise ZeroDivisionError
    assert global_state() == state


@pytest.mark.parametrize("name", sorted(loss_classes()))
def test_a_saved_and_loaded_loss_goes_on_alike(name: str) -> None:
    """All that a loss keeps between steps is in the state dict."""
    method = build(loss=name, loss_args=ARGS.get(name, {}))
    for step in range(3):
        method.loss(*batch(step), StubContext(0, step))
    torch.manual_seed(99)
    other = Baseline(method.config, FEATURES, CLASSES).double()
    other.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
    for step in range(3, 5):
        assert torch.equal(
            method.loss(*batch(step), StubContext(0, step)), other.loss(*batch(step), StubContext(0, step))
        )


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": "MultiSimilarityLos"}, "did you mean 'MultiSimilarityLoss'"),
        ({"loss": "multisimilarityloss"}, "did you mean 'MultiSimilarityLoss'"),
        ({"loss": "?"}, "known: .*'TripletMarginLoss'"),
        ({"loss": "CrossBatchMemory"}, "CrossBatchMemory is no loss of its own"),
        ({"miner": "MultiSimilarityMine"}, "did you mean 'MultiSimilarityMiner'"),
        ({"loss_args": {"alhpa": 2}}, "MultiSimilarityLoss takes no argument 'alhpa': did you mean 'alpha'"),
        (
            {"miner": "PairMarginMiner", "miner_args": {"pos_margn": 1}},
            "takes no argument 'pos_margn': did you mean 'pos_margin'",
        ),
        ({"miner_args": {"epsilon": 0.1}}, "no miner"),
        ({"loss": "ArcFaceLoss", "loss_args": {"num_classes": 4}}, "num_classes follows from the data"),
        ({"loss": "RankedListLoss"}, "RankedListLoss does not accept {}.*'margin'"),
        ({"loss": "SoftTripleLoss", "loss_args": {"centers_per_class": -1}}, "SoftTripleLoss does not accept"),
        # a value of the wrong type is seen by the loss only when it runs: now, not in the first step on a cluster
        ({"loss_args": {"alpha": "two"}}, "MultiSimilarityLoss with .*'two'.* fails"),
        ({"miner": "MultiSimilarityMiner", "miner_args": {"epsilon": "x"}}, "MultiSimilarityMiner with .*fails"),
        ({"loss": "PNPLoss", "miner": "MultiSimilarityMiner"}, "fails"),  # takes no tuples
        ({"classes_per_batch": 1}, "greater than or equal to 2"),
        ({"samples_per_class": 1}, "greater than or equal to 2"),
        ({"embedding_dim": 0}, "greater than or equal to 1"),
        ({"los": "NCALoss"}, "Extra inputs"),
    ],
)
def test_misuse_is_one_problem_that_names_the_way_out(values: dict, says: str) -> None:
    state = global_state()
    with pytest.raises(ValidationError, match=says) as caught:
        BaselineConfig(**values)
    problems = caught.value.errors()
    assert len(problems) == 1 and "\n" not in problems[0]["msg"]
    assert global_state() == state


# ---- defaults of the contract ----------------------------------------------------------------------------------------


def test_default_step_is_encode_backward_step() -> None:
    method = build()
    features = torch.randn(20, FEATURES, dtype=torch.float64, requires_grad=True)
    labels = batch()[1]
    recorder = StubContext(features=features)
    logs = method.training_step(Batch(torch.arange(20), labels, {}), recorder)
    assert recorder.calls == ["encode", "backward", "step main"]
    assert logs == {"loss": float(losses.MultiSimilarityLoss()(method.embed(features), labels).detach())}
    assert features.grad.abs().sum() > 0 and method.head.linear.weight.grad.abs().sum() > 0


def test_default_plan_is_class_balanced() -> None:
    method = build(classes_per_batch=3, samples_per_class=2)
    recorder = StubContext()
    np.testing.assert_array_equal(method.plan(5, recorder).ids, class_balanced(recorder.labels, 3, 2, 0, 5).ids)
    assert not method.plan_is_stored and method.config.mining is None


def test_default_optimizer_covers_every_parameter_once_at_its_rate() -> None:
    optimizer = {"lr": 0.1, "head_lr_multiplier": 10, "loss_lr_multiplier": 100}
    method = build(loss="ProxyAnchorLoss", optimizer=optimizer)
    trunk = torch.nn.Linear(3, FEATURES)
    built = method.optimizers(trunk)
    assert list(built) == ["main"]
    rates = {id(p): g["lr"] for g in built["main"].inner.param_groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in built["main"].inner.param_groups)
    expected = {id(p): 0.1 for p in trunk.parameters()} | {id(p): 1.0 for p in method.head.parameters()}
    assert rates == expected | {id(method.loss_function.proxies): 10.0}


def test_head_is_linear_and_unit_length() -> None:
    head = Head(FEATURES, DIM).double()
    x = torch.randn(7, FEATURES, dtype=torch.float64)
    z = x @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), z / (z * z).sum(1, keepdim=True).sqrt())


def test_a_method_has_to_say_its_loss() -> None:
    method = Method(MethodConfig(name="x"), FEATURES, CLASSES)
    with pytest.raises(TypeError, match="Method overrides neither `loss` nor `training_step`"):
        method.loss(*batch(), StubContext())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_registered_under_the_name_of_its_config(name: str) -> None:
    assert METHODS[name].Config.model_fields["name"].default == name
    assert METHODS[name].Config().name == name
