"""Search spaces: what is drawn lies in the space, Optuna agrees about it, and what cannot be meant is refused in one line."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tuning.space import Space

optuna.logging.set_verbosity(optuna.logging.ERROR)

CONDITIONAL = {
    "method.optimizer.lr": {"log_uniform": [1e-4, 3e-3]},
    "method.optimizer": {"weight_decay": 0.1},
    "method.embedding_dim": [64, 128],
    "method.loss": {
        "choice": {
            "ContrastiveLoss": {"method.loss_args": {"neg_margin": {"uniform": [0.25, 0.75], "step": 0.25}}},
            "ArcFaceLoss": {"method.loss_args.margin": {"int": [10, 40], "step": 15}},
            "TripletMarginLoss": {"method.loss_args.margin": {"uniform": [0.02, 0.3]}},
            "NormalizedSoftmaxLoss": None,
        }
    },
}

numbers = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))
positive = st.floats(1e-6, 1e3).map(lambda x: float(f"{x:.4g}"))


@st.composite
def ranges(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["uniform", "log_uniform", "int", "log_int"]))
    of = {"uniform": numbers, "log_uniform": positive, "int": st.integers(-50, 50), "log_int": st.integers(1, 999)}[
        kind
    ]
    low, high = sorted(draw(st.lists(of, min_size=2, max_size=2, unique=True)))
    out: dict[str, Any] = {kind: [low, high]}
    if kind == "int" and draw(st.booleans()):
        step = draw(st.integers(1, high - low))
        out = {kind: [low, low + step * draw(st.integers(1, (high - low) // step))], "step": step}
    if kind == "uniform" and draw(st.booleans()):
        step = draw(st.sampled_from([0.1, 0.25, 1, 3]))
        out = {kind: [1, round(1 + step * draw(st.integers(1, 12)), 6)], "step": step}
    return out


values = st.one_of(
    st.booleans(),
    st.none(),
    st.text("ab", min_size=1, max_size=3),
    st.integers(2, 9),
    st.lists(st.integers(), max_size=2),
)
choices = st.lists(values, min_size=1, max_size=4, unique_by=json.dumps)


@st.composite
def spaces(draw: Any, depth: int = 2, prefix: str = "k") -> dict[str, Any]:
    """A random space; keys are unique, so that each may stand anywhere."""
    out: dict[str, Any] = {}
    for i in range(draw(st.integers(1, 3))):
        key = f"{prefix}{i}"
        if depth and draw(st.booleans()):
            options = draw(st.lists(st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=3, unique=True))
            below = [draw(spaces(depth=depth - 1, prefix=f"{key}b{j}")) for j in range(len(options))]
            out[key] = {"choice": dict(zip(options, below, strict=True))}
        else:
            out[key] = draw(st.one_of(ranges(), choices, st.integers(), st.just({"choice": [1, 2]})))
    return out


def leaves(spec: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keys of a spec with their distributions, those of branches too; without constants."""
    out: list[tuple[str, Any]] = []
    for key, item in spec.items():
        if isinstance(item, (list, dict)):
            out.append((key, item))
        if isinstance(item, dict) and isinstance(item.get("choice"), dict):
            out += [leaf for below in item["choice"].values() for leaf in leaves(below or {})]
    return out


@settings(max_examples=80, deadline=None)
@given(spaces(), st.integers(0, 1000))
def test_draws_lie_in_the_space_and_optuna_agrees(spec: dict[str, Any], seed: int) -> None:
    space = Space(spec)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(3):
        trial = study.ask()
        drawn = space.draw(trial)
        study.tell(trial, 0.0)
        assert space.check_point(drawn) == drawn
        assert study.trials[-1].params == space.params(drawn)
        assert study.trials[-1].distributions == space.distributions(drawn)
        stored = json.loads(json.dumps(drawn))  # as a trial's record gives it back
        again = optuna.trial.create_trial(
            params=space.params(stored), distributions=space.distributions(stored), value=0
        )
        study.add_trial(again)


@settings(max_examples=80, deadline=None)
@given(spaces())
def test_corners_have_both_ends_and_every_option(spec: dict[str, Any]) -> None:
    space = Space(spec)
    corners = space.corners()
    for corner in corners:
        assert space.check_point(corner) == corner
    for key, item in leaves(spec):
        options = item if isinstance(item, list) else list(next(iter(item.values())))
        for option in options:
            seen = [corner[key] for corner in corners if key in corner]
            assert any(value == option and isinstance(value, bool) == isinstance(option, bool) for value in seen), key
    assert len(corners) <= sum(2 if isinstance(item, dict) else len(item) for _, item in leaves(spec)) * 3 + 1


@settings(max_examples=60, deadline=None)
@given(spaces(depth=1))
def test_the_grid_is_every_combination_once(spec: dict[str, Any]) -> None:
    space = Space(spec)
    if space.size() is None or space.size() > 5000:
        return
    grid = [json.dumps(point) for point in space.grid()]
    assert len(grid) == len(set(grid)) == space.size()
    for point in itertools.islice(space.grid(), 20):
        assert space.check_point(point) == point


def test_a_grid_by_hand() -> None:
    space = Space({"a": {"int": [1, 5], "step": 2}, "b": [True, None], "c": 7, "d": {"uniform": [0, 0.2], "step": 0.1}})
    expected = [{"a": a, "b": b, "c": 7, "d": d} for a in (1, 3, 5) for b in (True, None) for d in (0.0, 0.1, 0.2)]
    assert list(space.grid()) == expected and space.size() == 18


def test_keys_of_a_branch_exist_only_with_its_value() -> None:
    space = Space(CONDITIONAL)
    assert space.keys == [
        "method.optimizer.lr",
        "method.embedding_dim",
        "method.loss",
        "method.loss_args.neg_margin",
        "method.loss_args.margin",
    ]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    drawn = [space.draw(study.ask()) for _ in range(60)]
    for values in drawn:
        has = {key for key in values if key.startswith("method.loss_args")}
        assert has == {
            "ContrastiveLoss": {"method.loss_args.neg_margin"},
            "NormalizedSoftmaxLoss": set(),
        }.get(values["method.loss"], {"method.loss_args.margin"})
        assert values["method.optimizer.weight_decay"] == 0.1
        assert values.get("method.loss_args.neg_margin", 0.25) in (0.25, 0.5, 0.75)
        if values["method.loss"] == "ArcFaceLoss":
            assert values["method.loss_args.margin"] in (10, 25, 40)
        if values["method.loss"] == "TripletMarginLoss":
            assert 0.02 <= values["method.loss_args.margin"] <= 0.3
    assert len({values["method.loss"] for values in drawn}) == 4
    lrs = [math.log10(values["method.optimizer.lr"]) for values in drawn]
    assert abs(sum(lrs) / len(lrs) - (math.log10(1e-4) + math.log10(3e-3)) / 2) < 0.2  # uniform in the logarithm
    arcface = next(values for values in drawn if values["method.loss"] == "ArcFaceLoss")
    name = "method.loss_args.margin [method.loss = ArcFaceLoss]"  # two distributions of one key: two names in the study
    assert name in space.params(arcface) and space.names(arcface)[name] == "method.loss_args.margin"


def test_nested_points_are_completed_with_constants() -> None:
    space = Space(
        {"method.optimizer.lr": {"log_uniform": [1e-4, 1]}, "method.loss_args": [{"margin": 1}, {}], "seed": 3}
    )
    point = space.check_point({"method": {"optimizer": {"lr": 0.01}}, "method.loss_args": {"margin": 1}})
    assert point == {"method.optimizer.lr": 0.01, "method.loss_args": {"margin": 1}, "seed": 3}


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"lr": {"log_unifrom": [1, 2]}}, "space: lr: 'log_unifrom' is no distribution: did you mean 'log_uniform'?"),
        ({"lr": {"loguniform": [1, 2]}}, "did you mean 'log_uniform'?"),
        ({"lr": {"log_uniform": [0, 1]}}, "lr: got log_uniform [0, 1], expected numbers above 0"),
        ({"lr": {"uniform": [2, 1]}}, "lr: got uniform [2, 1], expected the smaller number first"),
        ({"lr": {"uniform": [1, 1]}}, "one value is a constant"),
        ({"lr": {"uniform": [0, "1"]}}, "lr: got uniform [0, '1'], expected two numbers, [low, high]"),
        ({"lr": {"uniform": [0, float("inf")]}}, "expected two numbers"),
        ({"n": {"int": [1, 2.5]}}, "n: got int [1, 2.5], expected two whole numbers"),
        ({"n": {"int": [1, 8], "step": 3}}, "no whole number of steps of 3 leads from 1 to 8: end at 7"),
        ({"n": {"int": [1, 8], "step": 0}}, "got step 0, expected a whole number above 0"),
        ({"n": {"log_int": [1, 8], "step": 2}}, "log_int has no step"),
        ({"n": {"choice": [1], "step": 2}}, "a choice has no step"),
        ({"n": {"choice": []}}, "n: the choice is empty"),
        ({"n": []}, "n: the choice is empty"),
        ({"n": {"choice": 3}}, "n: got choice 3, expected a list of values"),
        ({"n": [1, True]}, "the value True stands twice"),
        ({"n": {"choice": {"a": 3}}}, "below the option 'a' got 3, expected keys"),
        ({"n": {"uniform": [0, 1], "int": [0, 1]}}, "n: got int beside uniform, expected one distribution"),
        ({"n": {"uniform": [0, 1], "stpe": 1}}, "n: got stpe beside uniform"),
        ({"a.b": 1, "a": {"b": [2]}}, "a.b stands twice"),
        ({"a": [1, 2], "a.b": [1, 2]}, "a.b and a cannot be active at once"),
        ({"a": [1], "c": {"choice": {"x": {"a": [1, 2]}}}}, "c = x: a and a cannot be active at once"),
        ({"c": {"choice": {"x": {"k": [1]}}}, "d": {"choice": {"y": {"k": [1]}}}}, "k and k cannot be active at once"),
        ({"": [1]}, "got the key ''"),
    ],
)
def test_spaces_that_cannot_be_meant(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Space(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "point, message",
    [
        ({"method.embedding_dim": 64, "method.loss": "NormalizedSoftmaxLoss"}, "point has no method.optimizer.lr"),
        (
            {"method.optimizer.lr": 1.0},
            "method.optimizer.lr is 1.0, outside of the space: log_uniform from 0.0001 to 0.003",
        ),
        ({"method.embedding_dim": 65}, "method.embedding_dim is 65, outside of the space: one of 64, 128"),
        (
            {"method.loss": "ArcFaceLoss", "method.loss_args.margin": 11},
            "margin is 11, outside of the space: int from 10",
        ),
        ({"method.optimizer.weight_decay": 0.2}, "weight_decay is 0.2, but the space has the constant 0.1"),
        (
            {"method.optimiser.lr": 1e-3},
            "method.optimiser.lr is no key of the space here: did you mean 'method.optimizer.lr'?",
        ),
        ({"method.loss_args.margin": 0.1}, "it belongs to another option of a choice"),
    ],
)
def test_points_outside_of_the_space(point: dict[str, Any], message: str) -> None:
    good = {"method.optimizer.lr": 1e-3, "method.embedding_dim": 64, "method.loss": "NormalizedSoftmaxLoss"}
    base = {} if "has no" in message else good
    with pytest.raises(UserError) as error:
        Space(CONDITIONAL).check_point({**base, **point})
    assert message in str(error.value)


def test_a_continuous_key_has_no_grid() -> None:
    space = Space(CONDITIONAL)
    assert space.size() is None
    with pytest.raises(UserError, match=r"method\.optimizer\.lr is continuous .* add `step`"):
        list(space.grid())
    assert Space({}).size() == 1 and list(Space({}).grid()) == [{}] and Space({"a": 1}).keys == []
