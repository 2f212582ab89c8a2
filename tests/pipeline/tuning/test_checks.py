"""Bad sweeps: every one is told in one line, with the sweep's key, before the first trial."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from methods import plugins
from pipeline.console import console
from pipeline.data.store import Store
from pipeline.errors import UserError
from pipeline.tuning import checks
from pipeline.tuning.checks import check_sweep
from pipeline.tuning.sweep_config import SweepConfig
from tests.pipeline.tuning.sweeps import tiny_sweep, write_recipe

Make = Callable[..., SweepConfig]


@pytest.fixture
def make(tmp_path: Path, store: Store) -> Make:
    return lambda *overrides, **changes: tiny_sweep(tmp_path, store, *overrides, **changes)


def refusal(sweep: SweepConfig) -> str:
    with pytest.raises(UserError) as error:
        check_sweep(sweep)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_sweep_passes_and_its_notes_are_told_once(make: Make, store: Store) -> None:
    with console.capture() as captured:
        stores = check_sweep(make("folds=[0, 1, 2]"))
    assert {label: found.fingerprint for label, found in stores.items()} == {
        "triplet": store.fingerprint,
        "contrastive": store.fingerprint,
    }
    assert captured.get().count("1 training classes have one image each") == 1


def test_the_demo_is_prepared_later(tmp_path: Path) -> None:
    sweep = SweepConfig.model_validate(
        {
            "storage": str(tmp_path),
            "methods": {"m": {"recipe": "baseline/emoji"}},
            "space": {"method.optimizer.lr": [1e-4, 1e-3]},
            "budget": {"trials": 2},
        }
    )
    assert check_sweep(sweep, weights=False) == {}


SPACE: dict[str, tuple[Any, list[str]]] = {
    "a misspelt key": (
        {"method.optimiser.lr": {"log_uniform": [1e-4, 1]}},
        ["space.method.optimiser.lr = 0.0001", "unknown key 'method.optimiser'", "did you mean 'method.optimizer'"],
    ),
    "a key of another method": (
        {"method.memory_per_class": [1, 2]},
        ["space.method.memory_per_class = 1", "it is an option of the method mmsi"],
    ),
    "the lower end": (
        {"method.optimizer.lr": {"uniform": [-1, 0.1]}},
        ["space.method.optimizer.lr = -1.0", "method.optimizer.lr: got -1.0; input should be greater than"],
    ),
    "the upper end": (
        {"model.pooling": "avg", "data.transforms.erase": {"uniform": [0, 1.5]}},
        ["space.data.transforms.erase = 1.5", "input should be less than or equal to 1"],
    ),
    "one option": (
        {"model.pooling": ["avg", "min"]},
        ["space.model.pooling = 'min'", "'avg', 'max', 'avg+max' or 'native'"],
    ),
    "an impossible batch": (
        {"method.classes_per_batch": {"int": [2, 40]}, "length": "30 steps"},
        [],
    ),
}


@pytest.mark.parametrize(
    "space, parts", [v for k, v in SPACE.items() if v[1]], ids=[k for k, v in SPACE.items() if v[1]]
)
def test_every_end_of_the_space_is_put_into_the_config(make: Make, space: dict[str, Any], parts: list[str]) -> None:
    text = refusal(make(space=space))
    assert text.startswith("methods.triplet: ")
    for part in parts:
        assert part in text, text


def test_a_batch_that_a_fold_cannot_fill(make: Make) -> None:
    text = refusal(make(space={"method.classes_per_batch": {"int": [3, 10]}}, final=None, folds=[0, 1]))
    assert (
        "methods.triplet: space.method.classes_per_batch = 10: method: classes_per_batch is 10, but the training set"
        in text
    )
    assert "(trained without fold 0)" in text


def test_keys_of_a_branch_are_checked_with_their_option(make: Make) -> None:
    loss = {"choice": {"TripletMarginLoss": {"method.loss_args.margn": [0.1]}, "ContrastiveLoss": {}}}
    text = refusal(make(methods={"a": {"recipe": "tiny.yaml"}}, space={"method.loss": loss}))
    assert "margn" in text and "'margin'" in text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["metric=map@x"], "metric is 'map@x', expected one of"),
        (["metric=map"], "evaluation.metric is 'map', expected one of map@r"),
        (["metric=recall@3"], "metric is 'recall@3', expected one of"),
        (["folds=[0, 4]"], "folds: got 4, tiny"),
        (["folds=[0, 0]"], "folds: 0 stands twice"),
        (["folds=[-1]"], "folds: got -1"),
        (["final.seeds=[1, 1]"], "final.seeds: 1 stands twice"),
        (["space.seed=[1, 2]"], "space: seed is decided by the sweep: set seeds of the sweep"),
        (["settings.data.validation_fold=1"], "settings: data.validation_fold is decided by the sweep: set folds"),
        (["settings={evaluation: {checkpoint: last}}"], "settings: evaluation.checkpoint is decided by the sweep"),
        (["methods.triplet.settings.storage=x"], "methods.triplet.settings: storage is decided by the sweep"),
        (["methods.triplet.final_settings.seed=1"], "methods.triplet.final_settings: seed is decided by the sweep"),
        (["methods.triplet.final_settings.checkpoint.keep=1", "final=none"], "methods.triplet.final_settings are given, but final is none"),
        (["methods.triplet.final_settings.length=9 epochs"], "methods.triplet.final_settings: length has to be the same for all methods: set final.length"),
        (["final.settings.seed=1"], "final.settings: seed is decided by the sweep"),
        (["space.runtime.workers=[1, 2]"], "space: runtime.workers changes no figure: set it in settings"),
        (["space.length=['1 epochs', '2 epochs']"], "space: length is the budget"),
        (["space.data.source=[a, b]"], "space: data.source cannot be searched"),
        (["protocol=paper", "final={seeds: [0]}"], "final: under the paper protocol every trial measures the test classes"),
        (["protocol=paper", "final=null", "folds=[0, 1]"], "folds: the paper protocol trains on all training classes"),
        (["scheduler.name=pbt"], "scheduler pbt changes settings while it trains"),
        (["budget={}"], "budget: searcher tpe draws settings without end: set budget.trials, hours or gpu_hours"),
        (["budget={gpu_hours: 1}"], "budget.gpu_hours limits nothing where trials train on CPUs"),
        (["searcher.name=grid"], "method.optimizer.lr is continuous"),
        (["space={}"], "methods.contrastive: the space is empty, there is only one setting"),
        (["methods.triplet.points=[{method.optimizer.lr: 1e-3}]"], "methods.triplet.points[0] has no method.loss_args.margin"),
        (
            ["methods.contrastive.points=[{method.optimizer.lr: 1e-3}, {method.optimizer.lr: 2}]"],
            "methods.contrastive.points[1]: method.optimizer.lr is 2, outside of the space: log_uniform from 0.0001 to 0.01",
        ),
        (["budget.trials=1", "methods.contrastive.points=[{method.optimizer.lr: 1e-3}, {method.optimizer.lr: 2e-3}]"],
         "methods.contrastive.points has 2 points, budget.trials is 1"),
        (["settings.data.source=nowhere"], "there is no dataset 'nowhere'"),
        (["methods.contrastive.settings.data.source=emoji"], "methods.contrastive on emoji: figures of two datasets"),
        (["settings.model.weights=/no/such.pth"], "methods.triplet: "),
        (["methods.triplet.settings.method.loss_args.swop=1"], "swop"),
        (["settings.method.reload_best=[1]"], "unknown key 'method.reload_best'"),
    ],
)  # fmt: skip
def test_bad_sweeps(make: Make, overrides: list[str], message: str) -> None:
    assert message in refusal(make(*overrides))


def test_the_final_run_is_checked_too(make: Make) -> None:
    text = refusal(make("final.settings.method.embedding_dim=0"))
    assert "methods.triplet in final runs" in text and "method.embedding_dim: got 0" in text


def test_a_grid_needs_equal_sizes_under_fair(make: Make) -> None:
    space = {"method.optimizer.lr": [1e-3, 1e-2]}
    methods = {
        "triplet": {"recipe": "tiny.yaml", "space": {"method.embedding_dim": [4, 8]}},
        "contrastive": {"recipe": "tiny.yaml"},
    }
    changes = {"space": space, "methods": methods, "searcher": {"name": "grid"}, "budget": {}}
    assert "triplet has 4 trials and contrastive 2" in refusal(make(**changes))
    check_sweep(make("budget.trials=2", **changes))


def test_fair_methods_train_on_equally_many_images(make: Make) -> None:
    text = refusal(make("methods.contrastive.settings.length=6 epochs"))
    assert "a run of triplet trains on" in text and "one of contrastive on" in text
    assert "set length in methods.triplet.settings and methods.contrastive.settings" in text
    text = refusal(make("settings.length=30 steps", "methods.contrastive.settings.method.samples_per_class=4"))
    assert "a run of triplet trains on 360 images (30 steps) and one of contrastive on 480 (30 steps)" in text
    text = refusal(make("settings.length=30 steps", "space.method.samples_per_class=[3, 4]"))
    assert "from method.optimizer.lr = 0.0001" in text and "set length in methods.triplet.settings" in text
    check_sweep(make("methods.contrastive.settings.length=6 epochs", protocol="paper", final=None))


def test_a_dataset_without_test_classes_has_no_final_runs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "test_task", lambda config, store: None)
    assert "has no test classes to measure: set final to none" in refusal(make())


def test_a_searcher_whose_package_is_missing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    assert refusal(make()) == "searcher tpe needs the package optuna: pip install optuna"


def test_one_setting_is_a_sweep_of_one_trial(make: Make, tmp_path: Path, store: Store) -> None:
    write_recipe(tmp_path, store, "other")
    methods = {
        "a": {"recipe": "tiny.yaml"},
        "b": {"recipe": "other.yaml", "settings": {"method.loss": "ContrastiveLoss"}},
    }
    check_sweep(make(methods=methods, space={}, budget={"trials": 1}))
    check_sweep(make(methods=methods, space={}, budget={}, searcher={"name": "grid"}))


def test_validations_too_rare_for_the_scheduler_are_told(make: Make) -> None:
    def notes(*overrides: str) -> str:
        with console.capture() as captured:
            check_sweep(make(*overrides))
        return " ".join(captured.get().split())

    rare = "methods.triplet is validated every 2 epochs of 3 epochs: scheduler asha acts no earlier"
    assert (
        rare in notes("settings.evaluation.every=2 epochs")
        and "evaluation.every shorter than 25% of the length" in notes()
    )
    assert "is validated every" not in notes("scheduler.grace=0.34")
    assert "is validated every" not in notes("scheduler.name=none")


def test_code_of_a_users_own_lies_beside_the_sweep_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "loaded", False)
    monkeypatch.setenv(plugins.FOLDERS, "")
    text = "from torch import nn\nclass Mine(nn.Module):\n    def __init__(self, margin=1.0):\n        super().__init__()\n"
    text += "    def forward(self, embeddings, labels):\n        return embeddings.square().sum()\n"
    (tmp_path / "losses_of_a_sweep.py").write_text(text)
    own = "methods.contrastive.settings.method.loss=losses_of_a_sweep:Mine"
    check_sweep(make(own, "methods.contrastive.space={method.loss_args.margin: {uniform: [0, 1]}}"))
    assert "Mine takes no argument 'margn'" in refusal(
        make(own, "methods.contrastive.space={method.loss_args.margn: [0, 1]}")
    )
    assert str(tmp_path) in plugins.folders(), "the trials' processes look there too"
