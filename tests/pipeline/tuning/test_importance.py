"""Importance of keys in spaces whose scores are known functions of the settings."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from pipeline.tuning.importance import Importance, importance
from pipeline.tuning.sweep_config import SweepConfig
from pipeline.tuning.sweep_folder import State, TrialRecord
from tests.pipeline.tuning.synthetic import search

LR, DIM, KIND, WARMUP = "method.optimizer.lr", "method.embedding_dim", "method.optimizer.schedule.kind", "warmup"


def make_sweep(**values: Any) -> SweepConfig:
    space = {
        LR: {"log_uniform": [1e-4, 1e-2]},
        DIM: {"choice": [64, 128]},
        KIND: {"choice": {"cosine": {WARMUP: {"choice": ["10 steps", "20 steps"]}}, "constant": {}}},
        "method.fixed": 3,
    }
    return SweepConfig.model_validate(
        {"methods": {"a": {}, "b": {"space": {DIM: [[1, 2], [3]]}}}, "space": space, **values}
    )


def trials(count: int, method: str = "a", state: State = "finished", dims: Any = (64, 128)) -> list[TrialRecord]:
    """Scores that depend on lr strongly, and on the dimension hardly."""
    rng = random.Random(method)
    records = []
    for number in range(count):
        lr, dim, kind = 10 ** rng.uniform(-4, -2), rng.choice(list(dims)), rng.choice(["cosine", "constant"])
        score = 50 - 10 * abs(math.log10(lr) + 3) + dims.index(dim)
        record = search(number, method, score, state=state)
        record.values = {LR: lr, DIM: dim, KIND: kind, "method.fixed": 3}
        if kind == "cosine":
            record.values[WARMUP] = rng.choice(["10 steps", "20 steps"])
        records.append(record)
    return records


def test_the_key_that_decides_has_the_largest_share() -> None:
    found = importance(make_sweep(), trials(40), "a")
    assert next(iter(found.shares)) == LR and found.shares[LR] > 0.7
    assert set(found.shares) == {LR, DIM, KIND}  # no constant
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.trials == 40 and found.left_out == [WARMUP] and not found.reason


def test_it_is_the_same_each_time_and_does_not_depend_on_other_methods() -> None:
    own = trials(30)
    first = importance(make_sweep(), own, "a")
    assert importance(make_sweep(), [*own, *trials(35, "b")], "a") == first
    assert importance(make_sweep(), [*own, *trials(35, "a", "stopped")], "a") == first


def test_choices_that_optuna_cannot_store() -> None:
    found = importance(make_sweep(), trials(30, "b", dims=[[1, 2], [3]]), "b")
    assert set(found.shares) == {LR, DIM, KIND}


def test_none_is_given_where_it_would_mean_nothing() -> None:
    assert importance(make_sweep(), trials(29), "a") == Importance("a", 29, reason="needs 30 finished trials")
    pbt = make_sweep(scheduler={"name": "pbt"})
    assert importance(pbt, trials(30), "a").reason.startswith("population-based training")
    equal = trials(30)
    for record in equal:
        record.score = 1.0
    assert importance(make_sweep(), equal, "a").reason == "all trials have the same score"
    single = SweepConfig.model_validate({"methods": {"a": {}}, "space": {LR: {"log_uniform": [1e-4, 1e-2]}}})
    assert importance(single, trials(30), "a").reason == "fewer than two keys that all trials have"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    importance(make_sweep(), trials(30), "a")
    assert capfd.readouterr() == ("", "")
