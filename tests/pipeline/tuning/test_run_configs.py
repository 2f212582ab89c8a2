"""The runs of a trial: names, folds and seeds, what each protocol decides, and the settings' order."""

from __future__ import annotations

from typing import Any

import pytest

from methods.config import Length
from pipeline.errors import UserError
from pipeline.tuning.run_configs import run_configs
from pipeline.tuning.sweep_config import SweepConfig


def make(**changes: Any) -> SweepConfig:
    values = {"name": "s", "storage": "/data", "methods": {"m": {"recipe": "baseline/emoji"}}, **changes}
    return SweepConfig.model_validate(values)


def test_a_search_trial_validates_on_every_fold_and_seed() -> None:
    sweep = make(folds=[0, 2], seeds=[5, 6], metric="recall@1")
    runs = run_configs(sweep, "m", {"method.optimizer.lr": 0.01}, 7, "search")
    assert [run.name for run in runs] == [f"s-00007-fold{f}-seed{s}" for s in (5, 6) for f in (0, 2)]
    assert [(run.data.validation_fold, run.seed) for run in runs] == [(f, s) for s in (5, 6) for f in (0, 2)]
    for run in runs:
        evaluation = run.evaluation
        assert (evaluation.metric, evaluation.checkpoint) == ("recall@1", "best")
        assert not evaluation.test and not evaluation.clustering
        assert (run.protocol, run.storage, run.method.optimizer.lr) == ("fair", "/data", 0.01)


def test_final_runs_on_all_classes() -> None:
    sweep = make(final={"seeds": [0, 1], "settings": {"checkpoint.keep": 1}})
    runs = run_configs(sweep, "m", {}, 12, "final", length=Length(value=1.5, unit="epochs"))
    assert [run.name for run in runs] == ["s-00012-all-seed0", "s-00012-all-seed1"]
    assert all(run.data.validation_fold is None and run.evaluation.checkpoint == "last" for run in runs)
    assert all(run.evaluation.test and run.evaluation.clustering and run.checkpoint.keep == 1 for run in runs)
    assert str(runs[0].length) == "1.5 epochs"
    assert [run.seed for run in run_configs(sweep, "m", {}, 12, "final", seed=1)] == [1]
    assert str(run_configs(sweep, "m", {}, 12, "final", seed=1)[0].length) == "4 epochs"
    given = make(final={"length": "9 epochs"})
    assert str(run_configs(given, "m", {}, 0, "final", seed=1)[0].length) == "9 epochs"
    assert str(run_configs(given, "m", {}, 0, "search")[0].length) == "4 epochs"


def test_final_settings_of_one_method() -> None:
    own = {"model.weights": "another-run", "checkpoint.keep": 3}
    methods = {"m": {"final_settings": own}, "n": {}}
    sweep = make(methods=methods, final={"seeds": [0], "settings": {"checkpoint.keep": 1}})
    (searched,), (final,) = run_configs(sweep, "m", {}, 0, "search"), run_configs(sweep, "m", {}, 0, "final")
    assert (final.model.weights, final.checkpoint.keep) == ("another-run", 3), "these come after the sweep's own"
    assert searched.model.weights != "another-run" and searched.checkpoint.keep != 3
    (other,) = run_configs(sweep, "n", {}, 0, "final")
    assert other.model == searched.model and other.checkpoint.keep == 1


def test_final_runs_on_folds() -> None:
    sweep = make(folds=[0, 1], final={"seeds": [3], "classes": "folds", "length": "9 epochs"})
    runs = run_configs(sweep, "m", {}, 4, "final")
    assert [run.name for run in runs] == ["s-00004-fold0-seed3", "s-00004-fold1-seed3"]
    assert all(run.evaluation.test and run.evaluation.checkpoint == "best" for run in runs)
    assert str(runs[0].length) == "4 epochs"  # of the search: final.length is that of runs on all classes


def test_the_paper_protocol_keeps_the_recipes_evaluation() -> None:
    sweep = make(protocol="paper", final=None, methods={"m": {"recipe": "intra_batch/cub_resnet50"}}, metric="recall@1")
    (run,) = run_configs(sweep, "m", {}, 3, "search")
    assert (run.name, run.protocol, run.data.validation_fold) == ("s-00003-all-seed0", "paper", None)
    assert run.evaluation.test and run.evaluation.clustering and run.evaluation.checkpoint == "best"


def test_settings_are_applied_in_order_and_another_loss_drops_arguments() -> None:
    sweep = make(
        settings={"method": {"embedding_dim": 8}, "method.loss": "TripletMarginLoss", "length": "1 epochs"},
        methods={
            "m": {"recipe": "baseline/emoji", "settings": {"method.embedding_dim": 16}},
            "n": {"recipe": "baseline/emoji", "settings": {"method": {"loss": "MultiSimilarityLoss"}}},
        },
    )
    (run,) = run_configs(sweep, "m", {}, 0, "search")
    assert run.method.embedding_dim == 16 and run.method.loss_args == {}  # type: ignore[attr-defined]
    (run,) = run_configs(sweep, "m", {"method.loss_args.margin": 0.1, "method.embedding_dim": 4}, 0, "search")
    assert run.method.embedding_dim == 4 and run.method.loss_args == {"margin": 0.1}  # type: ignore[attr-defined]
    values = {"method.loss_args.margin": 30, "method.loss": "ArcFaceLoss"}  # in any order
    (run,) = run_configs(sweep, "n", values, 0, "search")
    assert run.method.loss_args == {"margin": 30}  # type: ignore[attr-defined]


def test_a_trial_has_a_worker_of_its_own() -> None:
    (run,) = run_configs(make(settings={"runtime.workers": 0}), "m", {}, 0, "search")
    assert run.runtime.workers == 1


def test_what_the_config_refuses_names_the_method() -> None:
    with pytest.raises(UserError, match=r"methods\.m: unknown key 'method\.optimizer\.lrr': did you mean"):
        run_configs(make(), "m", {"method.optimizer.lrr": 1}, 0, "search")
    with pytest.raises(
        UserError, match=r"data\.validation_fold cannot be set: data is 'emoji', expected keys and values"
    ):
        run_configs(make(settings={"data": "emoji"}), "m", {}, 0, "search")
